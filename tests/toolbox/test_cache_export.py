"""A denoising step on a cache as a program of `torch.export`, by the library's exporters."""

import pytest
import torch
from torch import nn
from torch.export import export

from dllm_hf import CanvasCache
from dllm_hf.generation.window import Window

from ..builders import new_model

exporters = pytest.importorskip("transformers.exporters.exporter_dynamo", reason="came with transformers 5.20")


class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, cache):
        kwargs = self.model.decoding_kwargs(4)
        return self.model(input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, **kwargs).logits


def cache_of(model, tokens: torch.Tensor) -> CanvasCache:
    """The cache of a canvas that was fed once, ready for a step over columns 4 to 7."""
    cache = model.make_cache(tokens.shape[1] + 1)
    columns = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    cache.place(Window(columns, columns[:, :0], tokens.shape[1], None, is_block_causal=model.block_grid == "zero"))
    model(tokens, position_ids=columns, past_key_values=cache, use_cache=True, **model.decoding_kwargs(4))
    cache.place(Window(columns[:, 4:8], columns[:, :0], 8, None))
    return cache


@torch.no_grad()
@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_a_step_on_a_cache_is_exported(family):
    exporters.register_pytree_node(CanvasCache)
    model = new_model(family)
    tokens = torch.arange(24).view(2, 12)
    inputs = {"input_ids": tokens[:, 4:8] + 1, "position_ids": torch.arange(4, 8).expand(2, -1).contiguous()}
    program = export(Step(model), (), {**inputs, "cache": cache_of(model, tokens)}).module()
    logits = program(**inputs, cache=cache_of(model, tokens + 30))
    expected = Step(model)(**inputs, cache=cache_of(model, tokens + 30))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
