"""What decoding asks of a model."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .configuration import CACHE_DTYPES
from .window import Window


class StepForward(Protocol):
    """Runs the steps on a GPU instead of a model's `forward`, without guidance. It is kept as long as the model and
    must hold no reference to it.

    takes_lists: whether its windows are lists of tokens, see [`Window`], or rectangles.
    """

    takes_lists: bool

    def covers(self, window: Window) -> bool:
        """Whether it can run a pass over the window."""

    def repeats(self, window: Window) -> bool:
        """Whether passes of its shape come again, so that one may be captured or compiled. Prompts in rectangles have many."""

    def prepare(self, cache: Any, slots: int) -> None:
        """Allocate the tensors of a cache for so many slots."""

    def __call__(self, tokens: torch.Tensor, window: Window, cache: Any) -> torch.Tensor:
        """Tokens of the shape of `window.columns` -> `(rows, block, vocab)` logits at `window.keep`."""


class DenoisingModel(nn.Module):
    """The base of models that can be decoded; the class attributes say all that decoding knows of an architecture.

    Attributes:
        config: with `vocab_size` and the special tokens; each family has its own class.
        logits_shift: the logits of position i stand at position i - `logits_shift`.
        block_grid: `"prompt"` aligns the blocks to the prompt's end, `"zero"` to position 0.
        cache_policies: the policies that the model can decode with, the default first.
        cache_dtypes: the types besides its own in which the model's cache can keep keys and values.
        default_block_length: positions decoded together; `None` decodes all masks as one block.
        default_remasking_strategy: used where neither call nor `generation_config.json` names one.
        confidence_source: `"raw"` reads confidence from the logits as the model gave them, `"processed"` after
            temperature, top-k and top-p.
        sees_earlier_blocks: whether a token sees its own and earlier blocks alone; otherwise it sees the whole canvas.
        quota_source: what `denoising_steps` divides into the quotas of a block's steps: `"masks"`, those of the block, or
            `"block"`, its length, so that a block that begins with prompt has larger steps. Then there are no more steps than
            tokens to fill.
        supports_editing: whether a token may be replaced until its block is done (`editing_threshold`).
        makes_masks: whether attention takes a mask that the loop makes; otherwise the model derives it from the blocks.
        has_fixed_block_length: whether the model decodes in blocks of `default_block_length` alone.
        seeds_blocks: whether a block's first token, the seed, is decided by a pass over the clean text before the block alone,
            whose last logits are the seed's whatever `logits_shift` is. With it, the policy is `block` or `none`.
        causal_context: whether the columns before the block see none behind themselves. With it, the policy is as above.
        default_small_block_size: positions of a block that are decoded together, from left to right, where they divide the
            block and the call says nothing; None for models that have no sub-blocks.
        capacity_step: the fast path allocates a multiple of this number of columns, see [`pool.capacity_for`]. The steps of
            a conversation that outgrows its columns are captured anew.
    """

    if TYPE_CHECKING:  # at run time `PreTrainedModel` would take this annotation for the family's configuration class
        config: Any
    device: torch.device
    dtype: torch.dtype
    logits_shift: int = 0
    block_grid: str = "prompt"
    cache_policies: tuple[str, ...] = ("none",)
    cache_dtypes: tuple[str, ...] = CACHE_DTYPES
    default_remasking_strategy: str = "low_confidence_static"
    confidence_source: str = "processed"
    sees_earlier_blocks: bool = False
    quota_source: str = "masks"
    supports_editing: bool = False
    makes_masks: bool = True
    has_fixed_block_length: bool = False
    seeds_blocks: bool = False
    causal_context: bool = False
    default_small_block_size: int | None = None
    capacity_step: int = 256

    @property
    def default_block_length(self) -> int | None:  # a property, since some families read it from their configuration
        return 32

    def make_cache(self, width: int) -> Any:
        """An empty [`cache.CanvasCache`] for a canvas of `width` columns."""
        raise NotImplementedError

    def step_forward(self) -> StepForward | None:
        """A new one for the model as it is now; None where there is none."""
        return None


def models_with(attribute: str) -> str:
    """The names of the model classes, as far as they are imported, for which an attribute of the contract is true."""
    classes, found = [DenoisingModel], set[str]()
    while classes:
        each = classes.pop()
        classes += each.__subclasses__()
        if getattr(each, attribute):
            found.add(each.__name__)
    return ", ".join(sorted(found)) or "none of those that are loaded"
