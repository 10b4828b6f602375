"""What the tests of all runtimes share: checkpoints, rows, and comparisons with the model itself."""

from pathlib import Path

import torch

from dllm_hf import STRATEGIES
from dllm_hf.generation.decoder import Decoder

from ..builders import generators, left_pad
from ..generation.test_decoder import BOUNDS

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = {"llada": "llada-mha", "dream": "dream-gqa", "sdar": "sdar-b4"}
CELLS = [(family, policy) for family in ("llada", "dream") for policy in ("none", "prefix", "dual")]
CELLS += [("sdar", "block"), ("sdar", "none")]
MASK = 300  # of the checkpoints
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [3, MASK, 12], [20, 21, 22, 23, 24]]


class Compared:
    """A backend that checks the logits of each pass against those of the model's own forward pass over the same window.

    Attributes:
        windows: `(shape of columns, shape of keep, what lengths depend on)` of all passes.
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
        expected = self.reference(tokens, window, self.expected_state)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        self.windows.add((tuple(window.columns.shape), tuple(window.keep.shape), window.seen))
        return expected


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
    assert len(backend.windows) > 2
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
