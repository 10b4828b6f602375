"""Triton, where it is installed: on a CPU alone it need not be, and the torch twins serve."""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def has_kernels(x) -> bool:
    """Whether a kernel can take a tensor: PyTorch for Windows comes without Triton, with a GPU as well."""
    return x.is_cuda and triton is not None
