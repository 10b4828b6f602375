"""Triton, where it is installed: on a CPU alone it need not be, and the torch twins serve."""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
