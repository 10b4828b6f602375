"""Gradient checkpointing, both kinds."""

import pytest
import torch

from .conftest import training_batch


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    calls, layer = [], model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(None))
    model.train()

    def gradients():
        calls.clear()
        model.zero_grad()
        model(**training_batch()).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2  # computed again on the way back
