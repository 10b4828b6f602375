"""Fast-dLLM v2: its configuration's own name of the block, and training with the shift."""

import pytest
import torch
from torch.nn import functional as F

from dllm_hf import Fast_dLLM_QwenConfig

from ..builders import MASK, new_model

CLEAN = torch.tensor([[5, 17, 33, 2, 8, 40, 9, 11, 12]])
NOISED = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 1, 1]]).bool()
NOISY = CLEAN.masked_fill(NOISED, MASK)


def test_the_block_keeps_its_name_on_disk():
    config = Fast_dLLM_QwenConfig(block_size=16)
    assert (config.bd_size, config.block_size, config.to_dict()["bd_size"]) == (16, 16, 16)
    assert "block_size" not in config.to_dict()
    assert (Fast_dLLM_QwenConfig().block_size, Fast_dLLM_QwenConfig().mask_token_id) == (32, 151665)
    with pytest.raises(ValueError, match="bd_size=0"):
        Fast_dLLM_QwenConfig(bd_size=0)


def test_a_masked_token_is_predicted_one_position_before_in_the_noisy_text():
    model, losses = new_model("fast_dllm_v2"), []
    hidden = []
    for start in range(0, 9, 4):
        text = torch.cat([CLEAN[:, :start], NOISY[:, start : start + 4]], dim=1)
        hidden.append(model(text).logits[0, start:])
    logits = torch.cat(hidden)
    for column in NOISED[0].nonzero().flatten().tolist():
        losses.append(F.cross_entropy(logits[column - 1], CLEAN[0, column]))
    loss = model(NOISY, labels=CLEAN.masked_fill(~NOISED, -100)).loss
    torch.testing.assert_close(loss, torch.stack(losses).mean())
