"""A random search through what the collator may be given: rows, schedules, padding, packing, and mistakes in them.

`DLLM_HF_FUZZ=5000 python -m pytest tests/fuzz/test_collators.py` searches further. A case is what its seed makes of it.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dllm_hf.training import DataCollatorForMaskedDiffusion

from ..builders import BUILDERS, END, MASK, PAD, character_tokenizer, new_model

pytestmark = pytest.mark.slow

PINNED = [55, 117, 140]  # cases that failed: padding behind a text that does not begin at position 0
SEEDS = sorted({*PINNED, *range(int(os.environ.get("DLLM_HF_FUZZ", 50)))})
TOKENIZER = character_tokenizer()
MODELS = {
    name: new_model(name, **{"n_layers" if name == "llada" else "num_hidden_layers": 1}).requires_grad_(False)
    for name in BUILDERS
}


@dataclass
class Text:
    """What is left of a row without its padding, `(length,)` each."""

    tokens: list[int]
    learnt: list[bool]
    positions: list[int]


@dataclass
class Case:
    """`rows` is what the collator gets, `texts` what it says."""

    options: dict
    rows: list[dict]
    texts: list[Text]
    packed: bool


def case_of(seed: int) -> Case:
    chance = random.Random(seed)
    schedule = chance.choice(["llada", "dream", "complementary"])
    options = {"schedule": schedule, "seed": seed, "pad_to_multiple_of": chance.choice([None, None, 1, 3, 8])}
    if schedule == "dream":
        options["weighting"] = chance.choice(["1/t", "1-t", "cart", "none"])
    if schedule == "complementary":
        options["block_size"] = chance.choice([1, 2, 3, 4, 8])
    packed = chance.random() < 0.4
    options["eos_padding"] = not packed and chance.random() < 0.3
    texts = [random_text(chance) for _ in range(chance.choice([1, 1, 2, 3, 5]))]
    return Case(options, [random_row(chance, text, packed) for text in texts], texts, packed)


def random_text(chance: random.Random) -> Text:
    length = chance.choice([0, 1, 2, 3, 4, 5, 8, 9, 12, 40])
    prompt = chance.choice([0, 0, chance.randint(0, length)])
    learnt = [place >= prompt and chance.random() < 0.95 for place in range(length)]
    positions, first = [], chance.choice([0, 0, 0, 5])  # of a text whose beginning is left out
    while len(positions) < length:
        part = chance.randint(1, length - len(positions))
        positions += range(first, first + part)
        first = 0
    return Text([chance.randrange(MASK) for _ in range(length)], learnt, positions)


def random_row(chance: random.Random, text: Text, packed: bool) -> dict:
    """A way to write a text: with padding anywhere, labels where needed, and in lists, tensors or arrays."""
    kept = [True] * len(text.tokens)
    for _ in range(chance.choice([0, 0, 1, 6])):
        kept.insert(chance.choice([0, len(kept), chance.randint(0, len(kept))]), False)

    def spread(values: list[int], filler: int) -> list[int]:
        values = iter(values)
        return [next(values) if real else filler for real in kept]

    row = {"input_ids": spread(text.tokens, PAD)}
    if not all(text.learnt) or chance.random() < 0.5:
        labels = [token if learnt else -100 for token, learnt in zip(text.tokens, text.learnt)]
        row["labels"] = spread(labels, chance.choice([PAD, -100]))
    if packed:
        row["position_ids"] = spread(text.positions, 0)
    if not all(kept) or chance.random() < 0.5:
        row["attention_mask"] = [int(real) for real in kept]
    kinds = [list, torch.tensor, lambda values: np.array(values, dtype=np.int32)]
    return {name: chance.choice(kinds)(values) for name, values in row.items()}


def batch_of(case: Case) -> dict[str, torch.Tensor]:
    return DataCollatorForMaskedDiffusion(TOKENIZER, **case.options)(case.rows)


def some_model(case: Case):
    return list(MODELS.values())[case.options["seed"] % len(MODELS)]


def search(check: Callable[[Case], None]) -> None:
    """Fails with the seeds of all cases that do."""
    failed = {}
    for seed in SEEDS:
        try:
            check(case_of(seed))
        except Exception as error:
            failed[seed] = f"{type(error).__name__}: {error}"[:300]
    assert not failed, f"{len(failed)} cases failed: {dict(list(failed.items())[:5])}"


# --- batches


def test_nothing_but_what_is_to_be_learnt_is_masked_and_labels_are_the_tokens():
    def check(case: Case):
        batch, number = batch_of(case), len(case.texts)
        views, end = len(batch["input_ids"]) // number, case.options["eos_padding"]
        assert views == (2 if case.options["schedule"] == "complementary" else 1)
        width = batch["input_ids"].shape[1]
        assert width >= 1 and width % (case.options["pad_to_multiple_of"] or 1) == 0
        assert case.packed == ("position_ids" in batch)
        for index in range(views * number):
            text, row = case.texts[index % number], {name: values[index].tolist() for name, values in batch.items()}
            padding = width - len(text.tokens)
            clean = text.tokens + [END if end else PAD] * padding
            learnt = text.learnt + [end] * padding
            assert row["attention_mask"] == [1] * len(text.tokens) + [int(end)] * padding
            assert not case.packed or row["position_ids"] == text.positions + [0] * padding
            for place in range(width):
                noisy, label, ratio = (row[name][place] for name in ("input_ids", "labels", "mask_ratio"))
                assert noisy == clean[place] or (noisy == MASK and learnt[place])
                assert label == -100 or (label == clean[place] and learnt[place])
                assert noisy != MASK or (label != -100 and ratio > 0)
                assert (label == -100) == (ratio == 0)
                assert noisy == MASK or label == -100 or ratio == float("inf")

    search(check)


def test_a_seed_makes_the_same_batch_again_whatever_the_rows_are_written_in():
    def check(case: Case):
        batch = batch_of(case)
        case.rows = [random_row(random.Random(1), text, case.packed) for text in case.texts]
        again = batch_of(case)
        assert batch.keys() == again.keys()
        assert all(torch.equal(batch[name], again[name]) for name in batch)

    search(check)


# --- what the models make of them


def test_every_family_has_a_finite_loss():
    def check(case: Case):
        batch = batch_of(case)
        for name, model in MODELS.items():
            assert model(**batch).loss.isfinite(), name

    search(check)


def test_the_loss_of_a_batch_is_that_of_its_texts_alone():
    def check(case: Case):
        batch = batch_of(case)
        model = some_model(case)
        together = model(**batch, num_items_in_batch=1).loss
        alone = torch.zeros(())
        for index, mask in enumerate(batch["attention_mask"]):
            row = {name: values[index : index + 1, : int(mask.sum())] for name, values in batch.items()}
            starts = [0]
            if case.packed:
                starts += [
                    place for place, position in enumerate(row["position_ids"][0].tolist()) if place and not position
                ]
            for start, stop in zip(starts, [*starts[1:], int(mask.sum())]):
                if stop > start:
                    one = {name: values[:, start:stop] for name, values in row.items()}
                    alone += model(**one, num_items_in_batch=1).loss
        torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)

    search(check)


# --- mistakes

MISTAKES = {
    "longer than the others": lambda values: [*values, 1],
    "nested": lambda values: [values, values],
    "ragged": lambda values: [values, [*values, 1]],
    "no integers": lambda values: [0.5, *values[1:]],
    "text": lambda values: "abc",
    "missing": None,
}


def test_a_mistake_in_a_row_is_refused_with_the_name_of_what_it_is_in():
    def check(case: Case):
        chance = random.Random(case.options["seed"])
        number = chance.randrange(len(case.rows))
        row = case.rows[number] = {name: [*map(int, values)] for name, values in case.rows[number].items()}
        name, (mistake, change) = chance.choice(list(row)), chance.choice(list(MISTAKES.items()))
        if len(row) == 1 and mistake == "longer than the others":
            return  # there are none
        if change is not None:
            row[name] = change(row[name])
        elif name in ("input_ids", "position_ids") and len(case.rows) > 1:
            del row[name]
        else:
            return  # the others may be left out, and one row is as good without positions
        try:
            batch_of(case)
        except ValueError as error:
            assert f"`{name}`" in str(error) or "`input_ids`" in str(error), (mistake, name, error)
        else:
            raise AssertionError(f"{name} was {mistake}, and nobody said so")

    search(check)


def test_positions_that_do_not_count_the_tokens_are_refused_by_name_or_have_a_finite_loss():
    def check(case: Case):
        if not case.packed:
            return
        chance = random.Random(case.options["seed"])
        for row in case.rows:
            positions = row["position_ids"]
            if len(positions):
                positions[chance.randrange(len(positions))] += chance.choice([-9, -1, 1, 3])
        try:
            assert some_model(case)(**batch_of(case)).loss.isfinite()
        except ValueError as error:
            assert "`position_ids`" in str(error), error

    search(check)


def test_an_option_that_does_not_fit_is_refused_by_name():
    wrong = {
        "schedule": ["linear", None],
        "weighting": ["t", "CART"],
        "block_size": [0, -4, 2.5, "4"],
        "pad_to_multiple_of": [0, -8, 1.5],
        "mask_token_id": [-1, "<mask>"],
        "cart_p": [0, -0.1, 1.01],
    }

    def check(case: Case):
        name = random.Random(case.options["seed"]).choice(list(wrong))
        for value in wrong[name]:
            with pytest.raises(ValueError, match=f"`{name}"):
                DataCollatorForMaskedDiffusion(TOKENIZER, **{**case.options, name: value})

    search(check)
