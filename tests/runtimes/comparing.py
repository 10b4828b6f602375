"""What the tests of all runtimes share: checkpoints, rows, comparisons with the model itself, and what spoils a folder."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dllm_hf import STRATEGIES
from dllm_hf.generation.decoder import Decoder
from dllm_hf.generation.window import Window

from ..builders import generators, left_pad
from ..generation.test_decoder import BOUNDS, alone, decode

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = {"llada": "llada-mha", "dream": "dream-gqa", "sdar": "sdar-b4"}
CELLS = [(family, policy) for family in ("llada", "dream") for policy in ("none", "prefix", "dual")]
CELLS += [("sdar", "block"), ("sdar", "none")]
MASK = 300  # of the checkpoints
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [3, MASK, 12], [20, 21, 22, 23, 24]]


def golden(family: str, layers: int | None = None):
    """A checkpoint of tests/golden in float32, or its first layers."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / CHECKPOINTS[family], dtype=torch.float32)
    if layers is not None:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
    return model


class Compared:
    """A backend that checks the logits of each pass against those of the model's own forward pass over the same window. A window
    that is a list is given to the model row by row.

    Attributes:
        windows: `(shape of columns, shape of keep, what lengths depend on)` of all passes of the model.
    """

    def __init__(self, eager, exported, has_cache: bool):
        self.backend, self.reference = exported.make_backend(has_cache), eager.make_backend(has_cache)
        self.windows: set[tuple] = set()

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def open(self, slots, width):
        self.expected_state = self.reference.open(slots, width)
        return self.backend.open(slots, width)

    def __call__(self, tokens, window, state):
        logits = self.backend(tokens, window, state)
        parts = rows_of(tokens, window) if self.takes_lists else [(tokens, window)]
        expected = torch.cat([self.reference(*part, self.expected_state) for part in parts])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        self.windows |= {(tuple(part.columns.shape), tuple(part.keep.shape), part.seen) for _, part in parts}
        return expected


def rows_of(tokens: torch.Tensor, window: Window) -> list[tuple[torch.Tensor, Window]]:
    """A list of tokens as a rectangle for each row."""
    parts = []
    for row, slot in enumerate(window.slots.tolist()):
        index = (window.owners == slot).nonzero().flatten()
        lengths = window.lengths[index][None]
        changes = {
            "slots": torch.tensor([slot]),
            "owners": torch.tensor([[slot]]),
            "columns": window.columns[index][None],
        }
        changes |= {"lengths": lengths, "keep": window.keep[row : row + 1] - index[0], "visible": int(lengths.max())}
        changes |= {"seen": "all" if (lengths == lengths.max()).all() else "token", "is_every_slot": False}
        parts.append((tokens[index][None], replace(window, **changes)))
    return parts


@torch.no_grad()
def check_windows(model, exported, policy: str) -> None:
    """Logits of every window of a decode: of ragged rows, one of which joins later; with pieces of a prompt ahead of the
    block (policy `block`)."""
    backend = Compared(model, exported, policy != "none")
    decoder = Decoder.open(backend, 3, 32)
    options = {"cache_policy": policy, "block_length": 4, "max_new_tokens": 10, "prefill_chunk_size": 4}
    decoder.add(*(model.diffusion_request(row, **options) for row in ROWS[:2]))
    for _ in range(3):
        decoder.step()
    decoder.add(model.diffusion_request(ROWS[2], **options))
    while decoder.busy:
        decoder.step()
    assert len(backend.windows) > 1
    assert policy != "block" or any(not keep[1] for _, keep, _ in backend.windows)


def check_strategies(model, exported, policy: str) -> None:
    """Tokens of every strategy, greedy and sampled, of ragged rows with a mask to fill in."""
    for strategy in STRATEGIES:
        options = {"remasking_strategy": strategy, **BOUNDS.get(strategy, {}), "cache_policy": policy}
        options |= {"max_new_tokens": 8, "block_length": 4}
        for sampling in ({}, {"temperature": 0.8, "top_p": 0.9}):
            got, expected = (
                each.diffusion_generate(**left_pad(ROWS), **options, **sampling, generator=generators([1, 2, 3]))
                for each in (exported, model)
            )
            assert got.tolist() == expected.tolist(), (strategy, sampling)


def check_later_rows(model, exported, policy: str) -> None:
    """Rows that join a decoder one after another get what they get alone."""
    calls = [
        (row, seed, {"remasking_strategy": strategy, "max_new_tokens": 5 + seed, "temperature": 0.7 * (seed % 2)})
        for seed, (row, strategy) in enumerate(zip(ROWS + ROWS, STRATEGIES))
    ]
    calls = [(row, seed, {**options, "block_length": 4, "eos_token_id": [8, 9]}) for row, seed, options in calls]
    decoder = Decoder.open(exported.make_backend(policy != "none"), 3, 48)
    got = decode(exported, decoder, policy, calls, [False, True, True, False, True])
    assert [text for text, _ in got] == [alone(model, policy, call)[0] for call in calls]


def check_guidance_and_defaults(model, exported) -> None:
    """Log-probabilities too."""
    for options in ({}, {"cfg_scale": 1.5, "block_length": 4}):
        options |= {"max_new_tokens": 8, "logprobs": 3, "generator": generators([1])}
        got = exported.diffusion_generate(torch.tensor([[5, 6, 7]]), **options)
        options["generator"] = generators([1])
        expected = model.diffusion_generate(torch.tensor([[5, 6, 7]]), **options)
        assert got.sequences.tolist() == expected.sequences.tolist()
        for name in ("logprobs", "top_logprobs"):
            torch.testing.assert_close(got[name], expected[name], atol=1e-3, rtol=0, equal_nan=True)


def other_folders(description: str, version: int) -> list[tuple[str, dict, str]]:
    """Of a folder of SDAR: a file, a change to it, and the message with which the folder is refused then."""
    return [
        (description, {"format": 99}, f"the format 99, and this version reads {version}"),
        (description, {"family": "llama"}, "`model_type='llama'` is none of the families"),
        ("config.json", {"model_type": "Dream"}, "`model_type='Dream'`, but the program in it of 'sdar'"),
    ]


def change(path: Path, **changes) -> None:
    """Change a file of JSON."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
