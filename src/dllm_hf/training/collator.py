"""Batches for `transformers.Trainer`: padding, packing's positions, noise."""

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .noising import context_weights, mask_complementary, mask_sequences

SCHEDULES = ("llada", "dream", "complementary")
WEIGHTINGS = ("1/t", "1-t", "cart", "none")


@dataclass
class DataCollatorForMaskedDiffusion(TrainerCallback):
    """Makes noisy batches of clean texts for the training of a masked-diffusion language model.

    A text is `input_ids`, a list or 1-D tensor. If it has `labels` too, they say what to learn: where they are -100, as
    in a prompt, tokens are never masked. Packed samples have `position_ids` that start from 0 in each
    ([`~dllm_hf.training.pack`]). `attention_mask`, 0 on padding, takes padding away.

        collator = DataCollatorForMaskedDiffusion(tokenizer, seed=0)
        Trainer(model, args, train_dataset=texts, data_collator=collator, callbacks=[collator])

    The batch has `input_ids`, `labels`, `mask_ratio` (what a token's loss is divided by), all `(batch, length)`, and
    where needed `attention_mask` and `position_ids`. The positions that are labelled are those that the loss is
    divided by, so that `Trainer` counts them right under gradient accumulation and in several processes.

    Args:
        tokenizer: for its mask, padding and end tokens.
        schedule: `llada` (also SDAR's): a rate for each sequence, or packed sample, a token's loss divided by it, and the
            sum by the number of tokens that there are to learn, masked or not (arXiv:2502.09992, equation 3).
            `dream`: the same rates, weights of choice, the sum divided by the number of masked tokens.
            `complementary`: a rate for each block, each text twice, the masks inverted, no weights (Fast-dLLM v2).
        weighting: of `dream`: `1/t` for a rate of t, `1-t`, `none`, or `cart` ([`~training.noising.context_weights`]).
        cart_p: of `cart`.
        block_size: of `complementary`.
        eos_padding: pad with end-of-sequence tokens that are learnt like the text, so that the model says by itself
            where an answer ends, as LLaDA's and Dream's fine-tuning does.
        pad_to_multiple_of: makes the length of a batch a multiple of this.
        mask_token_id: the tokenizer's if not given.
        seed: with it, and passed to `Trainer` as a callback as well, noise depends on nothing but seed, epoch and batch:
            a resumed run sees what the unbroken one would have seen, whatever the number of workers. Without it,
            PyTorch's generator draws.
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
    # In shared memory, so that workers that live longer than an epoch see it change.
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
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"`block_size={self.block_size}` must be at least 1.")
        if self.mask_token_id is None:
            self.mask_token_id = self.tokenizer.mask_token_id
        if self.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token: give `mask_token_id`, as in the model's configuration.")
        if self.eos_padding and self.tokenizer.eos_token_id is None:
            raise ValueError("`eos_padding` needs a tokenizer with an `eos_token`.")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch.fill_(int(state.epoch or 0))

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens, maskable, real, positions = self._padded(features)
        generator = None
        if self.seed is not None:
            # Of the text too, so that no two batches of an epoch share their noise. All in 32 bits: of a longer seed
            # PyTorch's generator on the CPU reads no more.
            start = zlib.crc32(f"{self.seed} {int(self._epoch)}".encode())
            generator = torch.Generator().manual_seed(zlib.crc32(tokens.numpy().tobytes(), start))
        packed = positions is not None
        samples = None
        if packed:
            begun = ((positions == 0) & real).long().cumsum(1)
            samples = begun - begun[:, :1]
        if self.schedule == "complementary":
            places = positions if packed else torch.arange(tokens.shape[1]).expand_as(tokens)
            # Counted through the row, so that packed samples have blocks of their own.
            blocks = ((places % self.block_size == 0) & real).long().cumsum(1)
            noisy, labels = mask_complementary(tokens, maskable, self.mask_token_id, blocks, generator)
            ratio = torch.ones(())
            real, positions = real.repeat(2, 1), None if positions is None else positions.repeat(2, 1)
        else:
            noisy, labels, rates = mask_sequences(tokens, maskable, self.mask_token_id, samples, generator)
            rates = rates.view(len(tokens), -1).expand(tokens.shape)
            if self.schedule == "llada":
                # Every token to learn has a label, so that they are counted; what is not masked weighs nothing.
                ratio = torch.where(labels != -100, rates, torch.inf)
                labels = torch.where(maskable, tokens, -100)
            else:
                ratio = 1 / self._weights(rates, real & (labels == -100), samples)
        ratio = torch.where(labels != -100, ratio, 0.0)
        batch = {"input_ids": noisy, "labels": labels, "mask_ratio": ratio}
        if not real.all():
            batch["attention_mask"] = real.long()
        if positions is not None:
            batch["position_ids"] = positions
        return batch

    def _weights(self, rates: torch.Tensor, known: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
        if self.weighting == "cart":
            return context_weights(known, self.cart_p, samples)
        return {"1/t": 1 / rates, "1-t": 1 - rates, "none": torch.ones_like(rates)}[self.weighting]

    def _padded(self, features: list[dict[str, Any]]):
        """Tokens, what may be masked, what is no padding, and the positions of packed samples or None; all `(batch,
        length)`. Padding stands on the right: where decoding pads, positions would not start at the first column."""
        if not features or "input_ids" not in features[0]:
            raise ValueError(
                "The collator got no `input_ids`: tokenize the dataset first (`Trainer` drops columns that the model's "
                "`forward` does not know, unless `remove_unused_columns=False`)."
            )
        has_positions = "position_ids" in features[0]
        if has_positions and self.eos_padding:
            raise ValueError(
                "`eos_padding` pads single texts: leave it out for packed samples, which end by themselves."
            )
        rows = []
        for feature in features:
            ids = torch.as_tensor(feature["input_ids"])
            labels = torch.as_tensor(feature["labels"]) if feature.get("labels") is not None else ids
            if labels.shape != ids.shape or ids.ndim != 1:
                raise ValueError(
                    f"`labels` {tuple(labels.shape)} and `input_ids` {tuple(ids.shape)} of a text must be two lists of "
                    "the same length."
                )
            row = [ids, labels != -100]
            if has_positions:
                row.append(torch.as_tensor(feature["position_ids"]))
            if feature.get("attention_mask") is not None:
                kept = torch.as_tensor(feature["attention_mask"]).bool()
                row = [column[kept] for column in row]
            rows.append(row)
        length = max(len(row[0]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        tokenizer = self.tokenizer
        filler = (
            tokenizer.eos_token_id if self.eos_padding or tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        columns = [
            _stacked([row[i] for row in rows], length, value)
            for i, value in enumerate([0 if filler is None else filler, self.eos_padding, 0][: 2 + has_positions])
        ]
        real = _stacked([torch.ones_like(row[1]) for row in rows], length, self.eos_padding)
        tokens, maskable = columns[0].long(), columns[1]
        return tokens, maskable, real, columns[2].long() if has_positions else None


def _stacked(rows: list[torch.Tensor], length: int, value) -> torch.Tensor:
    if all(len(row) == length for row in rows):
        return torch.stack(rows)
    padded = rows[0].new_full((len(rows), length), value)
    for row, values in zip(padded, rows):
        row[: len(values)] = values
    return padded
