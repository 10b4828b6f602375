"""Batches for `transformers.Trainer`: padding, packing's positions, noise."""

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .noising import context_weights, mask_complementary, mask_sequences

SCHEDULES = ("llada", "dream", "complementary")
WEIGHTINGS = ("1/t", "1-t", "cart", "none")
OPTIONAL = ("labels", "position_ids", "attention_mask")  # columns of a text beside `input_ids`


@dataclass
class DataCollatorForMaskedDiffusion(TrainerCallback):
    """Makes noisy batches of clean texts, for the training of a masked-diffusion language model.

    A text is `input_ids`, a list or 1-D tensor. With `labels`, tokens at -100, as in a prompt, are never masked. Packed
    samples have `position_ids` that start from 0 in each ([`~dllm_hf.training.pack`]). `attention_mask`, 0 on padding,
    takes padding away. An empty text becomes a row of padding.

        collator = DataCollatorForMaskedDiffusion(tokenizer, seed=0)
        Trainer(model, args, train_dataset=texts, data_collator=collator, callbacks=[collator])

    The batch has `input_ids`, `labels`, `mask_ratio` (what a token's loss is divided by), `attention_mask`, and for
    packed samples `position_ids`, all `(batch, length)`. `Trainer` counts the labels, also under gradient accumulation
    and over several processes, and divides the sum of the losses by their number.

    Args:
        tokenizer: its mask, padding and end tokens are used.
        schedule: `llada` (also SDAR's): one rate for each sequence or packed sample; a token's loss is divided by it, and
            the sum by the number of tokens to learn, masked or not (arXiv:2502.09992, equation 3). `dream`: the same
            rates, `weighting`, and the sum divided by the number of masked tokens. `complementary`: one rate for each
            block, each text twice with inverted masks, no weights (Fast-dLLM v2).
        weighting: for `dream`: `1/t` for a rate of t, `1-t`, `none`, or `cart` ([`~training.noising.context_weights`]).
        cart_p: for `cart`.
        block_size: for `complementary`.
        eos_padding: pad with end-of-sequence tokens that are learnt like the text, so that the model learns where an
            answer ends, as in LLaDA's and Dream's fine-tuning.
        pad_to_multiple_of: the length of a batch is a multiple of it.
        mask_token_id: the tokenizer's if not given. LLaDA's tokenizer has none, its mask is an added token: give
            `model.config.mask_token_id`.
        seed: with it, and with the collator passed to `Trainer` as a callback too, noise depends on seed, epoch and batch
            alone: not on the number of workers, or on whether the run was resumed. Without it, PyTorch's generator
            draws.
    """

    tokenizer: PreTrainedTokenizerBase
    schedule: str = "llada"
    weighting: str = "1/t"
    cart_p: float = 0.1
    block_size: int | None = None
    eos_padding: bool = False
    pad_to_multiple_of: int | None = None
    mask_token_id: int | None = None
    seed: int | None = None
    # In shared memory, so that persistent workers read the current epoch.
    _epoch: torch.Tensor = field(init=False, repr=False, default_factory=lambda: torch.zeros(1).share_memory_())

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule={self.schedule!r}` is unknown: choose one of {', '.join(SCHEDULES)}.")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"`weighting={self.weighting!r}` is unknown: choose one of {', '.join(WEIGHTINGS)}.")
        if self.weighting != "1/t" and self.schedule != "dream":
            raise ValueError(
                f"`weighting={self.weighting!r}` is for `schedule='dream'`; `{self.schedule}` has its own: leave it out."
            )
        if not 0 < self.cart_p <= 1:
            raise ValueError(f"`cart_p={self.cart_p}` must be above 0 and at most 1.")
        if (self.schedule == "complementary") != (self.block_size is not None):
            raise ValueError(
                "`schedule='complementary'` needs `block_size`, the model's, and the others have no use for it."
            )
        if self.mask_token_id is None:
            self.mask_token_id = self.tokenizer.mask_token_id
        if self.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token: give `mask_token_id=model.config.mask_token_id`.")
        for name, least in (("block_size", 1), ("pad_to_multiple_of", 1), ("mask_token_id", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}={value!r}` must be an integer of at least {least}.")
        if self.eos_padding and self.tokenizer.eos_token_id is None:
            raise ValueError("`eos_padding` needs a tokenizer with an `eos_token`.")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch.fill_(int(state.epoch or 0))

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens, maskable, real, positions = self._padded(features)
        generator = None
        if self.seed is not None:
            # The text is part of the seed, so that no two batches of an epoch share their noise. 32 bits, since PyTorch's
            # generator on the CPU reads no more.
            start = zlib.crc32(f"{self.seed} {int(self._epoch)}".encode())
            generator = torch.Generator().manual_seed(zlib.crc32(tokens.numpy().tobytes(), start))
        mask_token_id: Any = self.mask_token_id  # an integer since `__post_init__`
        packed = positions is not None
        samples = None
        if packed:
            counts = ((positions == 0) & real).long().cumsum(1)
            samples = counts - counts[:, :1]
        if self.block_size is not None:  # of the complementary schedule alone
            columns = positions if packed else torch.arange(tokens.shape[1]).expand_as(tokens)
            # Counted through the row, so that packed samples do not share blocks.
            blocks = ((columns % self.block_size == 0) & real).long().cumsum(1)
            noisy, labels = mask_complementary(tokens, maskable, mask_token_id, blocks, generator)
            ratio = torch.ones(())
            real, positions = real.repeat(2, 1), None if positions is None else positions.repeat(2, 1)
        else:
            noisy, labels, rates = mask_sequences(tokens, maskable, mask_token_id, samples, generator)
            rates = rates.view(len(tokens), -1).expand(tokens.shape)
            if self.schedule == "llada":
                # Every token to learn has a label, so that they are counted; what is not masked weighs nothing.
                ratio = torch.where(labels != -100, rates, torch.inf)
                labels = torch.where(maskable, tokens, -100)
            else:
                ratio = 1 / self._weights(rates, real & (labels == -100), samples)
        ratio = torch.where(labels != -100, ratio, 0.0)
        # Also a mask of ones, so that all batches have the same columns.
        batch = {"input_ids": noisy, "labels": labels, "mask_ratio": ratio, "attention_mask": real.long()}
        if positions is not None:
            batch["position_ids"] = positions
        return batch

    def _weights(self, rates: torch.Tensor, known: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
        if self.weighting == "cart":
            return context_weights(known, self.cart_p, samples)
        return {"1/t": 1 / rates, "1-t": 1 - rates, "none": torch.ones_like(rates)}[self.weighting]

    def _padded(self, features: list[dict[str, Any]]):
        """Tokens, what may be masked, what is not padding, and the positions of packed samples or None; all `(batch,
        length)`. Padding is on the right, so that positions start at the first column."""
        if not features or not any("input_ids" in feature for feature in features):
            raise ValueError(
                "The collator got no `input_ids`: tokenize the dataset first (`Trainer` drops columns that the model's "
                "`forward` does not know, unless `remove_unused_columns=False`)."
            )
        packed = any(feature.get("position_ids") is not None for feature in features)
        if packed and self.eos_padding:
            raise ValueError(
                "`eos_padding` pads single texts: leave it out for packed samples, which end by themselves."
            )
        rows = [_read(number, feature, packed) for number, feature in enumerate(features)]
        length = max(1, *(len(row[0]) for row in rows))
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        filler = self.tokenizer.pad_token_id
        if self.eos_padding or filler is None:
            filler = self.tokenizer.eos_token_id or 0
        pads = (filler, self.eos_padding, self.eos_padding, 0)
        columns = [
            torch.stack([F.pad(values, (0, length - len(values)), value=pad) for values in column])
            for column, pad in zip(zip(*rows), pads)
        ]
        return columns if packed else [*columns, None]


def _read(number: int, feature: dict[str, Any], packed: bool) -> list[torch.Tensor]:
    """Of a text without its padding, `(length,)` each: tokens, what may be masked, ones, positions if it is packed."""
    for name in ("input_ids", "position_ids")[: 1 + packed]:
        if feature.get(name) is None:
            raise ValueError(
                f"Row {number} of the batch has no `{name}`, and others do: give it in all rows or in none."
            )
    ids = _numbers(number, "input_ids", feature["input_ids"])
    columns = {name: _numbers(number, name, feature[name]) for name in OPTIONAL if feature.get(name) is not None}
    for name, values in columns.items():
        if len(values) != len(ids):
            raise ValueError(
                f"`{name}` of row {number} of the batch has {len(values)} elements, and `input_ids` {len(ids)}: both "
                "must be as many."
            )
    labels = columns.get("labels", ids)
    maskable = labels != -100
    if (labels != ids)[maskable].any():
        raise ValueError(
            f"`labels` of row {number} of the batch are not the tokens of `input_ids` at the same positions: give the token itself where it "
            "is to be learnt, -100 elsewhere, and clean text in `input_ids`. The collator draws the noise."
        )
    row = [ids, maskable, torch.ones_like(maskable), *([columns["position_ids"]] if packed else [])]
    if "attention_mask" in columns:
        row = [values[columns["attention_mask"] != 0] for values in row]
    return row


def _numbers(number: int, name: str, values) -> torch.Tensor:
    """`(length,)`, int64."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` of row {number} of the batch is no list of integers ({error}).") from None
    if tensor.ndim != 1 or (len(tensor) and (tensor.is_floating_point() or tensor.is_complex())):
        raise ValueError(
            f"`{name}` of row {number} of the batch must be a list of integers, but is {tuple(tensor.shape)} of "
            f"{tensor.dtype}: one text in each row."
        )
    return tensor.long()
