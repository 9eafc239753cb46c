"""Makes Triton's interpreter usable and right on a machine without a GPU.

Two holes are closed, both seen with Triton 3.6.0 and numpy 2.4, the first with 3.7.1 too:
- ``tl.dot`` multiplies the raw bit patterns of bfloat16: silently wrong numbers.
- A loop bound that is a tensor becomes ``int(array of one element)``: a TypeError.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install():
    """Patches the interpreter once; the kernels may be imported before or after."""
    if getattr(interpreter, "_pyeff_shim", False):
        return
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot_widened(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    def as_index(self):
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", as_index)

    builder.create_dot = create_dot_widened
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._pyeff_shim = True
