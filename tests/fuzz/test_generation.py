"""Random calls of `diffusion_generate`: what holds for every call, whatever its options."""

import os
import random

import pytest
import torch

from dllm_hf import STRATEGIES
from dllm_hf.generation.configuration import ALIASES, OF_DENOISING_STEPS

from ..builders import MASK, PAD, VOCAB, character_tokenizer, generate, generators, tiny_model

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("DLLM_HF_FUZZ", 120))
FAMILIES = (
    "llada",
    "llada_moe",
    "dream",
    "sdar",
    "sdar_moe",
    "llada2",
    "gla_dream",
    "nemotron_diffusion",
    "fast_dllm_v2",
)
ENDS = [3, 9, 21, 33, 50]


class Notes:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.tokens: list[int] = []

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        pass


def maybe(dice: random.Random, chance: float, options: dict, name: str, *values) -> None:
    if dice.random() < chance:
        options[name] = dice.choice(values)


def random_call(dice: random.Random):
    """A model, rows and options, all of them right."""
    model = tiny_model(dice.choice(FAMILIES))
    rows = [
        [MASK if dice.random() < 0.15 else dice.randrange(MASK) for _ in range(dice.choice([0, 1, 2, 3, 5, 8, 13]))]
        for _ in range(dice.choice([1, 1, 2, 3]))
    ]
    options = {"max_new_tokens": dice.choice([0, 1, 2, 5, 9, 16])}
    if options["max_new_tokens"] == 0 and not any(rows):
        rows[0] = [MASK]
    options["cache_policy"] = dice.choice(model.cache_policies)
    options["remasking_strategy"] = dice.choice(list(STRATEGIES))
    options["eos_token_id"] = dice.sample(ENDS, dice.randrange(4))
    options["pad_token_id"] = PAD
    if model.config.model_type != "gla_dream":
        maybe(dice, 0.6, options, "block_length", 1, 2, 3, 4, 8, 40)
    if model.default_small_block_size and options.get("block_length", 4) in (4, 8, 40):
        maybe(dice, 0.6, options, "small_block_size", 1, 2, 4)
        if options["cache_policy"] == "block":
            maybe(dice, 0.5, options, "use_block_cache", True)
    if model.supports_editing and STRATEGIES[options["remasking_strategy"]].confidence == "probability":
        maybe(dice, 0.7, options, "editing_threshold", 0.0, 0.05, 0.3)
    maybe(dice, 0.3, options, dice.choice(["steps", "denoising_steps"]), 1, 2, 3, 7, 100)
    maybe(dice, 0.4, options, "temperature", 0.5, 1.0, 1.7)
    maybe(dice, 0.2, options, "top_k", 1, 3, 1000)
    maybe(dice, 0.2, options, "top_p", 0.3, 0.9)
    maybe(dice, 0.2, options, "min_p", 0.05, 0.5)
    maybe(dice, 0.2, options, "alg_temp", 0.3, 2.0)
    maybe(dice, 0.2, options, "repetition_penalty", 0.7, 1.5)
    maybe(dice, 0.2, options, "confidence_threshold", 0.1, 0.9)
    maybe(dice, 0.2, options, "suppress_tokens", [5, 6], [1])
    maybe(dice, 0.2, options, "bad_words_ids", [[7], [8]])
    maybe(dice, 0.2, options, "confidence_suppress_tokens", [10, 11, 12])
    maybe(dice, 0.2, options, "check_interval", 2, 5)
    maybe(dice, 0.2, options, "prefill_chunk_size", 1, 3)
    maybe(dice, 0.15, options, "cfg_scale", 0.5)
    maybe(dice, 0.2, options, "stop_strings", ["e"], ["xy", "d", "!"])
    if "stop_strings" in options:
        options["tokenizer"] = character_tokenizer()
    if model.causal_context and dice.random() < 0.5:
        left_out = (*OF_DENOISING_STEPS, "repetition_penalty")
        options = {name: value for name, value in options.items() if name not in left_out}
        options["self_speculation"] = True
    return model, rows, options


def check_output(rows: list[list[int]], options: dict, output) -> None:
    """What holds for each row: the prompt is what it was, no mask is left, padding alone stands behind the end."""
    width, number = max(map(len, rows)), options["max_new_tokens"]
    assert output.sequences.shape == (len(rows), width + number)
    suppressed = {*options.get("suppress_tokens", []), *(word for [word] in options.get("bad_words_ids", []))}
    for row, sequence in zip(rows, output.sequences.tolist(), strict=True):
        sequence = sequence[width - len(row) :]
        assert MASK not in sequence
        for given, now in zip(row, sequence):
            assert now == given or given == MASK and now not in suppressed
        new = sequence[len(row) :]
        assert not suppressed & set(new)
        ends = [index for index, token in enumerate(new) if token in options["eos_token_id"]]
        if ends:
            assert set(new[ends[0] + 1 :]) <= {PAD}
        if "stop_strings" in options:
            texts = [options["tokenizer"].decode(new[: index + 1]) for index in range(len(new))]
            found = [index for index, text in enumerate(texts) if any(s in text for s in options["stop_strings"])]
            assert not found or set(new[found[0] + 1 :]) <= {PAD}


def check_call(seed: int) -> None:
    dice = random.Random(seed)
    model, rows, options = random_call(dice)
    seeds = [dice.randrange(100) for _ in rows]
    output = generate(model, rows, generator=generators(seeds), output_history=True, **options)
    check_output(rows, options, output)
    width = max(map(len, rows))
    for index, (row, of_row) in enumerate(zip(rows, seeds, strict=True)):
        if not row and not options["max_new_tokens"]:
            continue  # alone it is refused: there is nothing to fill
        streamer = Notes()
        alone = generate(model, [row], generator=generators([of_row]), streamer=streamer, **options)
        assert alone.sequences[0].tolist() == output.sequences[index, width - len(row) :].tolist()
        assert alone.tokens_per_forward[0] == output.tokens_per_forward[index]
        shown = alone.sequences[0].tolist()
        assert streamer.tokens == shown[: len(streamer.tokens)]
        assert set(shown[len(streamer.tokens) :]) <= {PAD}
    if "block" in model.cache_policies and not options.get("use_block_cache"):
        other = {**options, "cache_policy": "none" if options["cache_policy"] == "block" else "block"}
        same = generate(model, rows, generator=generators(seeds), **other)
        assert same.sequences.tolist() == output.sequences.tolist()
    if output.past_key_values is not None:
        following = [
            [*row, *sequence[width:], dice.randrange(MASK)] for row, sequence in zip(rows, output.sequences.tolist())
        ]
        turn = {**options, "max_new_tokens": 3, "generator": generators(seeds)}
        fresh = generate(model, following, **{**turn, "generator": generators(seeds)})
        resumed = generate(model, following, past_key_values=output.past_key_values, **turn)
        assert resumed.sequences.tolist() == fresh.sequences.tolist()


@pytest.mark.parametrize("first", range(0, CASES, 25))
def test_random_calls_keep_what_is_promised(first):
    for seed in range(first, min(first + 25, CASES)):
        try:
            check_call(seed)
        except Exception as error:
            raise AssertionError(f"The call of seed {seed}: {error}") from error


@pytest.mark.parametrize("first", range(0, CASES, 50))
def test_random_options_are_refused_by_name_or_taken(first):
    """Values of any kind: a call either decodes or is a `ValueError` that names what is wrong."""
    numbers = [True, False, -1, 0, 1, 2, 10**20, 0.5, -0.5, float("nan"), float("inf")]
    values = [None, *numbers, "", "x", [], [1], [[]], {}, {5}]
    model = tiny_model("sdar")
    names = [*type(model.generation_config).DEFAULTS, *ALIASES, "use_cache", "num_beams", "frob"]
    for seed in range(first, min(first + 50, CASES)):
        dice = random.Random(seed)
        options = {dice.choice(names): dice.choice(values) for _ in range(dice.choice([1, 1, 2]))}
        call = {"max_new_tokens": 3, **options}
        if options.get("max_length") is not None:
            call.pop("max_new_tokens", None)
        try:
            sequences = model.diffusion_generate(torch.tensor([[11, 12, 13]]), **call)
        except ValueError as error:
            meant = {*options, *(ALIASES.get(name, name) for name in options), "cache_policy", "remasking_strategy"}
            assert any(name in str(error) for name in meant), (seed, error)
        else:
            output = sequences if torch.is_tensor(sequences) else sequences.sequences
            assert output[0, :3].tolist() == [11, 12, 13] and int(output.max()) < VOCAB, seed
