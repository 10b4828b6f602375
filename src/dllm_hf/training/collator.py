"""Batches for `transformers.Trainer`: padding, packing's positions, noise."""

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .noising import context_weights, mask_complementary, mask_sequences

SCHEDULES = ("llada", "dream", "complementary")
WEIGHTINGS = ("1/t", "1-t", "cart", "none")
OPTIONAL = ("labels", "position_ids", "attention_mask")  # of a text, beside `input_ids`


@dataclass
class DataCollatorForMaskedDiffusion(TrainerCallback):
    """Makes noisy batches of clean texts for the training of a masked-diffusion language model.

    A text is `input_ids`, a list or 1-D tensor. If it has `labels` too, they say what to learn: where they are -100, as
    in a prompt, tokens are never masked. Packed samples have `position_ids` that start from 0 in each
    ([`~dllm_hf.training.pack`]). `attention_mask`, 0 on padding, takes padding away. An empty text becomes a row of
    padding, from which nothing is learnt.

        collator = DataCollatorForMaskedDiffusion(tokenizer, seed=0)
        Trainer(model, args, train_dataset=texts, data_collator=collator, callbacks=[collator])

    The batch has `input_ids`, `labels`, `mask_ratio` (what a token's loss is divided by), `attention_mask`, and for
    packed samples `position_ids`, all `(batch, length)`. The positions that are labelled are those that the loss is
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
        mask_token_id: the tokenizer's if not given. A tokenizer may have none, as LLaDA's, whose mask is an added token:
            give `model.config.mask_token_id`.
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
        # A mask that masks nothing too, so that all batches have the same columns.
        batch = {"input_ids": noisy, "labels": labels, "mask_ratio": ratio, "attention_mask": real.long()}
        if positions is not None:
            batch["position_ids"] = positions
        return batch

    def _weights(self, rates: torch.Tensor, known: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
        if self.weighting == "cart":
            return context_weights(known, self.cart_p, samples)
        return {"1/t": 1 / rates, "1-t": 1 - rates, "none": torch.ones_like(rates)}[self.weighting]

    def _padded(self, features: list[dict[str, Any]]):
        """Tokens, what may be masked, what is no padding, and the positions of packed samples or None; all `(batch,
        length)`. Padding stands on the right: where decoding pads, positions would not start at the first column. An
        empty text is a row of padding."""
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
        tokenizer = self.tokenizer
        filler = (
            tokenizer.eos_token_id if self.eos_padding or tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        fillers = [0 if filler is None else filler, self.eos_padding, 0]
        columns = [_stacked(list(column), length, value) for column, value in zip(zip(*rows), fillers)]
        real = _stacked([torch.ones_like(row[1]) for row in rows], length, self.eos_padding)
        return columns[0], columns[1], real, columns[2] if packed else None


def _read(number: int, feature: dict[str, Any], packed: bool) -> list[torch.Tensor]:
    """Tokens, what may be masked and, of packed samples, positions of a text without its padding, `(length,)` each."""
    for name in ("input_ids", "position_ids")[: 1 + packed]:
        if feature.get(name) is None:
            raise ValueError(
                f"Row {number} of the batch has no `{name}`, and others do: give it in all rows or in none."
            )
    ids = _numbers(number, "input_ids", feature["input_ids"])
    given = {name: _numbers(number, name, feature[name]) for name in OPTIONAL if feature.get(name) is not None}
    for name, values in given.items():
        if len(values) != len(ids):
            raise ValueError(
                f"`{name}` of row {number} of the batch has {len(values)} elements, and `input_ids` {len(ids)}: both "
                "must be as many."
            )
    labels = given.get("labels", ids)
    maskable = labels != -100
    if (labels != ids)[maskable].any():
        raise ValueError(
            f"`labels` of row {number} of the batch are not the tokens at their places: give the token itself where it "
            "is to be learnt, -100 elsewhere, and clean text in `input_ids`. The collator draws the noise."
        )
    row = [ids, maskable, *([given["position_ids"]] if packed else [])]
    if "attention_mask" in given:
        row = [values[given["attention_mask"] != 0] for values in row]
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


def _stacked(rows: list[torch.Tensor], length: int, value) -> torch.Tensor:
    if all(len(row) == length for row in rows):
        return torch.stack(rows)
    padded = rows[0].new_full((len(rows), length), value)
    for row, values in zip(padded, rows):
        row[: len(values)] = values
    return padded
