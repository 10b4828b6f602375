"""Without a GPU the kernels run in Triton's interpreter: tests/conftest.py chooses it."""

import numpy as np
import torch

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # the tests are skipped
    interpreter = None

if interpreter is not None and not torch.cuda.is_available():
    plain = interpreter._patch_lang_tensor
    convert = interpreter._convert_float

    def patched(tensor, *scope):
        """Triton 3.6 turns arrays of one element into numbers in a way that NumPy 2.4 refuses. Triton 3.5 has no scope."""
        plain(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: self.handle.data.item())

    def converted(data, before, after, rounding):
        """The interpreter makes 16 of 31.9 in 8 bits: it forgets what rounding carries into the exponent."""
        if (before, after) != (tl.float32, tl.float8e4nv):
            return convert(data, before, after, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    interpreter._patch_lang_tensor = patched
    interpreter._convert_float = converted
