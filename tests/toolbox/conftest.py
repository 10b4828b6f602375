"""Every test here is about every family."""

import pytest
import torch

from ..builders import BUILDERS, MASK, new_model

TOKENS = torch.tensor([[3, 4, MASK, 6, 7, MASK, 9, MASK], [11, MASK, 13, 14, 15, 16, MASK, 18]])


@pytest.fixture(params=BUILDERS)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    """A model of one's own, to change."""
    return new_model(family)


@pytest.fixture
def folder(model, tmp_path):
    """The model, saved."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits.float()


def training_batch() -> dict[str, torch.Tensor]:
    labels = torch.where(TOKENS == MASK, 8, -100)
    return {"input_ids": TOKENS, "labels": labels, "mask_ratio": torch.tensor([0.4, 0.3])}


def decoded(model) -> list[list[int]]:
    """Greedy, and without Dream's random order: the same model always decodes the same."""
    output = model.diffusion_generate(TOKENS, max_new_tokens=4, remasking_strategy="low_confidence_static")
    assert output.shape == (2, 12) and not (output == MASK).any()
    return output.tolist()
