"""`torch.compile` of the forward pass, without a graph break.

Compiling takes seconds: each family is compiled once with a mask and once without, once forward and once in training.
"""

import pytest
import torch

from ..builders import BUILDERS, MASK, left_pad, new_model

ROWS = [[3, 4, MASK, 6, 7, MASK, 9, MASK, 8], [11, MASK, 13], [21, 22, 23, 24, MASK]]


def batch_of(padded: bool) -> dict[str, torch.Tensor]:
    return left_pad(ROWS) if padded else {"input_ids": torch.tensor([ROWS[0]] * 3)}


@pytest.fixture
def model(family):
    """One layer says as much as two, and compiles in half the time."""
    return new_model(family, **{"n_layers" if family == "llada" else "num_hidden_layers": 1})


@pytest.fixture
def compiled(model):
    torch.compiler.reset()
    yield torch.compile(model, fullgraph=True, backend="eager")
    torch.compiler.reset()


@pytest.mark.parametrize("family, padded", [(family, index % 2 == 1) for index, family in enumerate(BUILDERS)])
@torch.no_grad()
def test_the_forward_pass_is_one_graph(model, compiled, padded):
    batch = batch_of(padded)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family, padded", [(family, index % 2 == 0) for index, family in enumerate(BUILDERS)])
def test_the_training_pass_is_one_graph(model, compiled, padded):
    batch = batch_of(padded)
    batch["labels"] = torch.where(batch["input_ids"] == MASK, 8, -100)
    batch["mask_ratio"] = torch.tensor([0.4, 0.3, 0.2])
    model.train()

    def run(forward):
        model.zero_grad()
        loss = forward(**batch).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    torch.testing.assert_close(run(compiled), run(model), atol=1e-5, rtol=1e-4)
