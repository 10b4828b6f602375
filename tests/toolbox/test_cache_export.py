"""A denoising step on a cache as a program of `torch.export`, by the library's exporters."""

import pytest
import torch
from torch import nn
from torch.export import export

from dllm_hf import CanvasCache
from dllm_hf.generation.window import Frame, make_window

from ..builders import new_model

exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
# Private in transformers 5.13, public in 5.17.
REGISTER = "register_pytree_node" if hasattr(exporters, "register_pytree_node") else "_register_pytree_node"


class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, cache):
        return self.model(input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True).logits


def cache_of(model, tokens: torch.Tensor) -> CanvasCache:
    """The cache of a canvas that was fed once, ready for a step over columns 4 to 7."""
    rows, width = tokens.shape
    cache = model.make_cache(width + 1)
    for start, end in ((0, width), (4, 8)):
        frame = Frame(start, end, start, end, 8, 8, start, 0)
        cache.set_window(make_window([frame] * rows, list(range(rows)), rows, width, 0, 0))
        if end == width:
            model(tokens, position_ids=torch.arange(width).expand(rows, -1), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_a_step_on_a_cache_is_exported(family):
    getattr(exporters, REGISTER)(CanvasCache)
    model = new_model(family)
    tokens = torch.arange(24).view(2, 12)
    inputs = {"input_ids": tokens[:, 4:8] + 1, "position_ids": torch.arange(4, 8).expand(2, -1).contiguous()}
    program = export(Step(model), (), {**inputs, "cache": cache_of(model, tokens)}).module()
    logits = program(**inputs, cache=cache_of(model, tokens + 30))
    expected = Step(model)(**inputs, cache=cache_of(model, tokens + 30))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
