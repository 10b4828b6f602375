"""A storm of requests: random lengths, options, deadlines, faults and aborts."""

import os
import random

import psutil
import pytest
import torch

from dllm_hf import STRATEGIES, SamplingParams
from dllm_hf.engine.engine import Engine

from ..builders import MASK, VOCAB, tiny_model

pytestmark = pytest.mark.slow
REQUESTS = max(50 * int(os.environ.get("DLLM_HF_FUZZ", 200)), 10_000)


def random_request(draw: random.Random) -> tuple[list[int], SamplingParams]:
    tokens = [token for token in range(VOCAB) if token != MASK]
    prompt = draw.choices([*tokens, MASK], k=draw.choice([0, 1, 5, 20]))
    params = SamplingParams(
        max_tokens=draw.choice([1, 2, 4, 9]),
        temperature=draw.choice([0.0, 1.0]),
        remasking_strategy=draw.choice(list(STRATEGIES)),
        denoising_steps=draw.choice([None, 1, 2]),
        n=draw.choice([1, 1, 1, 3]),
        seed=draw.choice([None, 7]),
        timeout=draw.choice([None] * 20 + [1e-6]),
    )
    return prompt, params


@pytest.mark.parametrize("family, policy", [("llada", "dual"), ("sdar", "block"), ("gla_dream", "block")])
def test_every_request_of_a_storm_ends_once_and_nothing_is_left_behind(family, policy):
    """No hang, no slot that is not free again, no request that others overtake, and no memory that grows."""
    torch.set_num_threads(1)
    draw, model = random.Random(0), tiny_model(family)
    engine = Engine(model, None, 64, 48, {"cache_policy": policy}, 10**6, token_budget=256, cache_columns=700)
    failing = iter([draw.random() < 0.002 for _ in range(10**6)])

    def fail(*_):
        if next(failing):
            raise RuntimeError("boom")

    handle = model.register_forward_pre_hook(fail)
    number, reasons, alive, passed_over, memory = 0, set(), {}, [], []
    try:
        while number < REQUESTS or not engine.is_idle:
            for _ in range(draw.randrange(24) if number < REQUESTS and len(engine.waiting) < 500 else 0):
                sequences = engine.intake.prepare(*random_request(draw), str(number))
                alive |= {(each.request_id, each.index): each for each in sequences}
                engine.submit(sequences)
                number += 1
            if draw.random() < 0.5 and number:
                engine.abort(str(draw.randrange(max(number - 200, 0), number)))
            for event in engine.step():
                if event.output is not None:
                    key = (event.request_id, event.index)
                    passed_over.append(alive.pop(key).passed_over)  # which fails for one that has ended
                    reasons.add(event.finish_reason)
            if len(engine.waiting) < 400 and number > 1000:
                memory.append(psutil.Process().memory_info().rss)
    finally:
        handle.remove()
    assert not alive
    assert reasons == {"stop", "length", "abort", "timeout", "error"}
    assert all(row is None for row in engine._decoder.rows) and not engine._decoder.features
    assert max(passed_over) <= engine.max_passed_over
    if (extents := getattr(engine._decoder.workspace.state, "extents", None)) is not None:
        assert max(passed_over) > 0  # there was less room than slots
        for slot in range(64):  # what ended ones have left, for others to begin with
            extents.release(slot)
        assert extents.free == extents.columns - 1
    third = len(memory) // 3
    assert max(memory[-third:]) < max(memory[:third]) + 16 * 2**20  # 2 KiB a request
