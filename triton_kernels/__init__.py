"""The operators' GPU kernels in Triton; importing a module of this package needs ``triton``."""
