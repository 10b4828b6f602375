"""Kernels compiled ahead."""

import threading

import pytest
import torch

from dllm_hf.fused.stack import FusedStack
from dllm_hf.generation.decoder import Decoder
from dllm_hf.kernels.ahead import compiled_ahead
from dllm_hf.kernels.columns import _copy_columns, copy_columns, copy_columns_torch
from dllm_hf.kernels.layers import swiglu, swiglu_torch

from ..builders import as_list, new_model, window_of

pytestmark = pytest.mark.gpu


def test_inside_kernels_are_made_ready_and_not_launched():
    cache = _copy_columns.device_caches[torch.cuda.current_device()][0]
    arena = torch.randn(2, 40, 120, device="cuda")  # heads of a size that no other test has
    runs, unchanged, copied = torch.tensor([[3, 20, 7]], device="cuda"), arena.clone(), arena.clone()
    copy_columns_torch(copied, runs, 7)
    gate, up = torch.randn(2, 1, 3, 200, device="cuda", dtype=torch.bfloat16)
    before, found = set(cache), []
    with compiled_ahead():
        copy_columns(arena, runs, 7)
        other = threading.Thread(target=lambda: found.append(swiglu(gate, up)))
        other.start()
        other.join()
    made = [kernel for key, kernel in cache.items() if key not in before]
    assert made and all(kernel.module is not None for kernel in made) and torch.equal(arena, unchanged)
    torch.testing.assert_close(found[0], swiglu_torch(gate, up))
    copy_columns(arena, runs, 7)
    assert torch.equal(arena, copied) and len(cache) == len(before) + len(made)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_are_made_ready_for_the_current_device():
    with torch.cuda.device(1):
        gate, up = torch.randn(2, 1, 3, 300, device="cuda", dtype=torch.float16)
        with compiled_ahead():
            swiglu(gate, up)
        torch.testing.assert_close(swiglu(gate, up), swiglu_torch(gate, up))


# Heads of sizes that no other test has.
@pytest.mark.parametrize(
    ("family", "policy", "sizes"),
    [
        ("llada", "dual", {"n_heads": 2, "d_model": 144}),
        ("dream", "dual", {"num_attention_heads": 2, "hidden_size": 176}),
        ("sdar", "block", {"num_attention_heads": 2, "hidden_size": 208, "head_dim": 104}),
        ("nemotron_diffusion", "block", {"num_attention_heads": 4, "hidden_size": 224, "head_dim": 56}),
        ("fast_dllm_v2", "block", {"num_attention_heads": 4, "hidden_size": 160}),
    ],
)
def test_a_call_compiles_in_its_first_pass_alone(family, policy, sizes, monkeypatch):
    from triton import knobs

    compiled, passes, run = [], [], Decoder._pass

    def counted(decoder, chosen):
        passes.append(chosen)
        run(decoder, chosen)

    monkeypatch.setattr(Decoder, "_pass", counted)
    monkeypatch.setattr(knobs.compilation, "listener", lambda src, **_: compiled.append((src.name, len(passes))))
    model = new_model(family, **sizes).cuda()
    options = {"max_new_tokens": 16, "block_length": 4, "cache_policy": policy, "eos_token_id": []}
    options["remasking_strategy"] = "low_confidence_static"
    model.diffusion_generate(torch.full((1, 100), 5), **options)
    assert "_attend" in dict(compiled) and len(passes) > 3
    assert {number for _, number in compiled} == {1}, compiled


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_a_pass_gives_the_same_whether_its_kernels_were_compiled_ahead(family, monkeypatch):
    model = new_model(family).cuda()
    tokens, columns = torch.randint(60, (2, 8), device="cuda"), torch.arange(8, device="cuda").expand(2, 8)
    found = []
    for is_ahead in (True, False):
        if not is_ahead:
            monkeypatch.setattr(FusedStack, "_compile_for", lambda *_: None)
        stack, cache = FusedStack.of(model), model.make_cache(20)
        stack.prepare(cache, 2)
        found.append(stack(tokens.flatten(), as_list(window_of(columns, columns)), cache))
    assert torch.equal(*found)
