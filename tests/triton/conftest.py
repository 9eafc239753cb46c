"""Three kinds of tests, each a process of its own: interpreter, aot, gpu.

Kernels that the interpreter runs cannot be compiled in the same process, and the other way round.
"""
