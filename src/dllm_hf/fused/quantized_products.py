"""Linear layers of the same input whose weights torchao has quantised, as one matrix product."""

from typing import Any

import torch
from torch import nn

from ..kernels.layers import Float8Rows, quantize_rows, quantize_rows_torch
from ..kernels.products import MAX_ROWS, few_rows_product, few_rows_product_torch
from .joint_products import lock, side_by_side


class QuantizedProducts:
    """The products of an input with one linear layer or several, whose weights become parts of joint tensors, see
    [`JointProducts`]. What torchao does well for many rows is left to it.

    Attributes:
        takes_float8: whether the input may be [`Float8Rows`]; it is quantised where it is none.
    """

    takes_float8 = False

    def __init__(self, linears: list[nn.Linear], bias: torch.Tensor | None, *tensors: torch.Tensor):
        """`tensors`: what the weights consist of, side by side."""
        weight: Any = linears[0].weight
        self.sizes, self.bias, self.dtype = [len(linear.weight) for linear in linears], bias, weight.dtype
        self.tensors, self.is_on_gpu = tensors, tensors[0].is_cuda
        self.weight = self.joint(weight)

    @staticmethod
    def covers(weight: Any) -> bool:
        """Whether the weight of a linear layer is quantised in the way that the class computes with."""
        raise NotImplementedError

    @classmethod
    def tensors_of(cls, linears: list[nn.Linear]) -> list[torch.Tensor | None]:
        """What the weights consist of, side by side; None where that cannot be."""
        parts = lambda name: [getattr(linear.weight, name) for linear in linears]
        return [side_by_side(parts(name), linears[0], name) for name in ("qdata", "scale")]

    def joint(self, weight: Any) -> Any:
        """All weights as one of torchao's, of the kind of `weight`."""
        return type(weight)(*self.tensors, list(weight.block_size), dtype=weight.dtype)

    @staticmethod
    def of(linears: list[nn.Module]) -> "QuantizedProducts | None":
        """None where the linear layers are of another kind, or cannot be joined. Raises a `ValueError` where the GPU cannot
        multiply in 8 bits."""
        plain = [each for each in linears if type(each) is nn.Linear and "forward" not in vars(each)]
        kinds = {type(each.weight) for each in plain}
        if len(plain) < len(linears) or len(kinds) > 1 or len({each.bias is None for each in plain}) > 1:
            return None
        (of_weights,) = kinds
        kind = KINDS.get(of_weights.__name__) if of_weights.__module__.startswith("torchao.") else None
        if kind is None or not all(kind.covers(each.weight) for each in plain):
            return None
        with lock:
            tensors = kind.tensors_of(plain)
            bias = None if plain[0].bias is None else side_by_side([each.bias for each in plain], plain[0], "bias")
        found = [each for each in tensors if each is not None]
        if len(found) < len(tensors) or (bias is None) != (plain[0].bias is None):
            return None
        return kind(plain, bias, *found)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.product(x).split(self.sizes, dim=-1)

    def product(self, x: Any) -> torch.Tensor:
        """`(..., size)` -> `(..., outputs of all layers)`."""
        return nn.functional.linear(x, self.weight, self.bias)


class Float8Products(QuantizedProducts):
    """Weights and inputs in float8, with a scale for each row of both."""

    takes_float8 = True

    def __init__(self, linears: list[nn.Linear], bias: torch.Tensor | None, *tensors: torch.Tensor):
        super().__init__(linears, bias, *tensors)
        self.is_fast = self.weight.mm_config.use_fast_accum
        if self.is_on_gpu and torch.cuda.get_device_capability(tensors[0].device) < (8, 9):
            raise ValueError(
                f"The model's weights are in float8, and {torch.cuda.get_device_name(tensors[0].device)} cannot multiply "
                "such numbers: that takes compute capability 8.9. Load the model with int8 weights, or without "
                "`quantization_config`."
            )

    @staticmethod
    def covers(weight: Any) -> bool:
        of_input = weight.act_quant_kwargs
        return (
            of_input is not None
            and type(of_input.granularity).__name__ == "PerRow"
            and (of_input.hp_value_lb, of_input.hp_value_ub) == (None, None)
            and weight.qdata.dtype == of_input.float8_dtype == torch.float8_e4m3fn
            and _has_a_scale_for_each_row(weight)
        )

    def joint(self, weight: Any) -> Any:
        return weight

    def product(self, x: torch.Tensor | Float8Rows) -> torch.Tensor:
        weight, scales = self.tensors
        if not self.is_on_gpu:
            rows = x if isinstance(x, Float8Rows) else quantize_rows_torch(x)
            return few_rows_product_torch(rows, weight, scales, self.bias, self.dtype)
        rows = x if isinstance(x, Float8Rows) else quantize_rows(x.contiguous())
        shape = rows.values.shape[:-1]
        if shape.numel() <= MAX_ROWS[weight.dtype]:
            return few_rows_product(rows, weight, scales, self.bias, self.dtype)
        values, of_rows = (each.flatten(0, -2) for each in rows)
        is_wide = self.dtype == torch.float32  # to which PyTorch adds no bias
        options = {"out_dtype": self.dtype, "use_fast_accum": self.is_fast}
        out = torch._scaled_mm(values, weight.t(), of_rows, scales.t(), None if is_wide else self.bias, **options)
        out = out + self.bias if is_wide and self.bias is not None else out
        return out.view(*shape, -1)


class Int8Products(QuantizedProducts):
    """Weights in int8, with a scale for each row."""

    @staticmethod
    def covers(weight: Any) -> bool:
        return weight.act_quant_kwargs is None and weight.act_pre_scale is None and _has_a_scale_for_each_row(weight)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        is_few = x.shape[:-1].numel() <= MAX_ROWS[torch.int8] and x.dtype in (torch.bfloat16, torch.float16)
        if not (is_few and self.is_on_gpu):
            return super().product(x)
        weight, scales = self.tensors
        return few_rows_product(x.contiguous(), weight, scales, self.bias, x.dtype)


class Int4Products(QuantizedProducts):
    """Weights in int4, a scale and a zero for each group, in the tiles of PyTorch's own kernel. Scales of several layers lie
    one behind the other for each group, so that they are copied: one 32nd of the weights for groups of 128."""

    @staticmethod
    def covers(weight: Any) -> bool:
        return weight.act_pre_scale is None and weight.shape[0] % 8 == 0

    @classmethod
    def tensors_of(cls, linears: list[nn.Linear]) -> list[torch.Tensor | None]:
        weights: list[Any] = [linear.weight for linear in linears]
        if len(weights) == 1 or len({tuple(each.block_size) for each in weights}) > 1:
            return [None]
        tiles = side_by_side([each.qdata for each in weights], linears[0], "qdata")
        return [tiles, torch.cat([each.scale_and_zero for each in weights], dim=1)]

    def joint(self, weight: Any) -> Any:
        return type(weight)(*self.tensors, list(weight.block_size), torch.Size([sum(self.sizes), weight.shape[1]]))


def _has_a_scale_for_each_row(weight: Any) -> bool:
    return tuple(weight.block_size) == (1, weight.shape[1])


# By the name of torchao's class, which need not be installed.
KINDS: dict[str, type[QuantizedProducts]] = {
    "Float8Tensor": Float8Products,
    "Int8Tensor": Int8Products,
    "Int4TilePackedTo4dTensor": Int4Products,
}
