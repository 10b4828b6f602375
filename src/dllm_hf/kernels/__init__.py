"""Triton kernels of a decoding step. Each stands beside a plain torch twin of the same name with `_torch`, its oracle."""
