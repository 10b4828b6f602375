"""Self-speculation: the tokens of autoregressive decoding in fewer forward passes, by a model that reads its text causally.

A pass over the clean text gives the next token. A second one drafts the tokens behind it at once, as a denoising step: they
and the last token see each other, the text before is causal. A third reads the draft as clean text, which gives the token
behind each of its tokens: the draft is kept as far as these are its own, and the first that is another one is the next token.
The pass has written the keys of what is kept, so that drafting goes on from there. Nemotron-Labs-Diffusion's
`linear_spec_generate` (https://huggingface.co/nvidia/Nemotron-Labs-Diffusion-8B) is the same for one row without given tokens.
"""

import torch

from .canvas import Canvas
from .configuration import DiffusionGenerationConfig
from .contract import DenoisingModel, models_with
from .window import VERIFICATION, Window


def check_self_speculation(model: DenoisingModel, options: DiffusionGenerationConfig) -> None:
    """Raises a `ValueError` where a model cannot decode autoregressively."""
    if options.self_speculation and not (model.causal_context and model.seeds_blocks):
        raise ValueError(
            f"`self_speculation=True` is not possible with {type(model).__name__}, whose text is not causal, so that it cannot "
            f"verify a draft. Models that can: {models_with('causal_context')}. Leave it out."
        )


def verify(
    canvas: Canvas,
    window: Window,
    now: torch.Tensor,
    proposals: torch.Tensor,
    transfers: torch.Tensor,
    mask_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the masks back over a draft, and transfer the tokens that autoregressive decoding gives: up to the first that is
    another one than the draft's. Rows that verify nothing stay as they are.

    Args:
        now: `(rows, block)`, the block's tokens before the step.
        proposals: `(rows, block)`. transfers: `(rows, steps, block)` bool.

    Returns:
        `now` and `transfers`.
    """
    is_own = (window.block < canvas.capacity) & ~canvas.is_prompt[window.slots[:, None], window.block]
    is_own &= (window.speculation == VERIFICATION)[:, None]
    differs = ((proposals != now) & is_own).long()
    kept = is_own & (differs.cumsum(-1) == differs)  # nothing before differs
    verifies = (window.speculation == VERIFICATION)[:, None, None]
    return now.masked_fill(is_own, mask_token_id), torch.where(verifies, kept[:, None], transfers)
