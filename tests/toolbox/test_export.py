"""`torch.export` of the forward pass: one program for every batch and every length."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from ..builders import MASK, new_model

# Fewer tokens than a block, whole blocks, one token more; and more than the 16 blocks of 4 of a group of states.
SHAPES = [(1, 3), (3, 8), (2, 9), (4, 75)]


class Logits(nn.Module):
    """What is exported has fixed arguments, and tensors to return."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, logits_to_keep=None):
        options = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        return self.model(input_ids, attention_mask, use_cache=False, **options).logits


def inputs(names: list[str], batch: int, length: int) -> dict[str, torch.Tensor]:
    tokens = torch.arange(batch * length).view(batch, length) * 7 % (MASK + 1)
    mask = (torch.arange(length) >= torch.arange(batch)[:, None]) | (torch.arange(length) == length - 1)
    kept = torch.arange(batch)[:, None] * 3 % length + torch.tensor([[0, -1]])
    given = {"input_ids": tokens, "attention_mask": mask.long(), "logits_to_keep": kept % length}
    return {name: given[name] for name in ["input_ids", *names]}


def check_export(family: str, names: list[str], **changes):
    model = Logits(new_model(family, **{"n_layers" if family == "llada" else "num_hidden_layers": 1, **changes}))
    example = inputs(names, 3, 11)
    free = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in example}
    if "logits_to_keep" in names:
        free["logits_to_keep"] = {0: Dim.DYNAMIC}
    program = export(model, (), example, dynamic_shapes=free).module()
    for shape in [(3, 11), *SHAPES]:
        given = inputs(names, *shape)
        torch.testing.assert_close(program(**given), model(**given), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_exported_model_takes_any_batch_and_length(family):
    if family.startswith("sdar") and torch.__version__ < "2.10":
        pytest.skip("the trace of torch 2.9 loses a size in the block-causal mask")
    # Short convolutions come with GLADream's recommended configuration.
    changes = {"conv_size": 5, "logits_shift": 1} if family == "gla_dream" else {}
    check_export(family, ["attention_mask", "logits_to_keep"], **changes)


@torch.no_grad()
def test_an_exported_gladream_needs_no_mask():
    """Which lays out its blocks in another way."""
    check_export("gla_dream", ["logits_to_keep"])
