"""Noisy rows and their labels for tests of training forwards, and gradients to compare."""

import torch

from .builders import MASK, left_pad

CLEAN = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [21, 22, 23, 24, 25, 26], [31, 32, 33, 34, 35, 36, 37, 38, 39]]
MASKED = [[1, 2, 5, 8, 10], [4, 5], [0, 3, 4, 7]]


def noised(clean: list[int], masked: list[int]) -> tuple[list[int], list[int]]:
    """The noisy row and its labels."""
    noisy = [MASK if index in masked else token for index, token in enumerate(clean)]
    return noisy, [token if index in masked else -100 for index, token in enumerate(clean)]


PAIRS = [noised(clean, masked) for clean, masked in zip(CLEAN, MASKED, strict=True)]


def batch_of(pairs=PAIRS, side: str = "left") -> dict[str, torch.Tensor]:
    """side: on which the rows are padded."""
    batch = left_pad([noisy for noisy, _ in pairs])
    batch["labels"] = left_pad([labels for _, labels in pairs], pad=-100)["input_ids"]
    if side == "left":
        return batch
    padding = (batch["attention_mask"] == 0).sum(-1).tolist()
    return {name: torch.stack([row.roll(-n) for row, n in zip(x, padding, strict=True)]) for name, x in batch.items()}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: name + text)


def assert_same_loss(model, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """And the same gradients."""
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))
