"""Without a GPU the kernels run in Triton's interpreter: tests/conftest.py chooses it."""

import torch

try:
    from triton.runtime import interpreter
except ImportError:  # the tests are skipped
    interpreter = None

if interpreter is not None and not torch.cuda.is_available():
    plain = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        """Triton 3.6 turns arrays of one element into numbers in a way that NumPy 2.4 refuses. Triton 3.5 has no scope."""
        plain(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    converted = interpreter._convert_float

    def rounded(data, source, target, mode):
        """The interpreter loses the carry of a number that is rounded up to the next power of two, and cuts off subnormal
        ones."""
        if target.name != "fp8e4nv" or source.name != "fp32":
            return converted(data, source, target, mode)
        in_eight_bits = torch.from_numpy(data.copy()).clamp(-448, 448).to(torch.float8_e4m3fn)  # as the GPU: saturated
        return in_eight_bits.view(torch.uint8).numpy()

    interpreter._convert_float = rounded
