"""`benchmarks/timing.py` on a CPU, with a clock in the place of the device's."""

from itertools import count
from types import SimpleNamespace

import torch

from tests.builders import load_script, tiny_model


def test_the_passes_of_calls_are_told_apart_by_the_tokens_that_they_feed(monkeypatch):
    ticks = count()

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = next(ticks)

        def elapsed_time(self, other):
            return float(other.at - self.at)

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**{**vars(torch.cuda), "Event": Event, "synchronize": int}))
    timing = load_script("benchmarks/timing.py")
    run = timing.Decoder._run
    with timing.pass_times() as times:
        options = {"max_new_tokens": 8, "block_length": 4, "cache_policy": "dual", "return_dict_in_generate": True}
        output = tiny_model("llada").diffusion_generate(torch.tensor([[5, 6, 7]] * 2), eos_token_id=[], **options)
    # Of two rows a block's first step feeds the canvas, its other three the block.
    assert {tokens: len(found) for tokens, found in times.items()} == {22: 2, 8: 6}
    assert output.num_forward_passes == 8 and set(times[8]) == {1.0}
    assert timing.Decoder._run is run
