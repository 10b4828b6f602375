"""What only a GPU can show: the same tokens as on the CPU, and the back ends that run there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import dllm_hf  # noqa: F401  registers the families
from dllm_hf.generation.draft_costs import pass_times, room_for_drafts, tokens_of_step
from dllm_hf.generation.pool import fused_of

from ..builders import left_pad
from ..test_golden import CASES, GOLDEN, check_case

pytestmark = pytest.mark.gpu


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / folder, device_map="cuda", **kwargs)


@pytest.mark.parametrize("folder", sorted({folder.name for folder, _ in CASES}))
def test_golden_cases_hold_on_cuda(folder):
    model = load(folder)
    for case_folder, case in CASES:
        if case_folder.name == folder:
            check_case(model, case_folder, case)


BLOCK_DIFFUSION = ["sdar-b4", "sdar_moe-b4", "llada2_moe-grouped", "nemotron_labs_diffusion-gqa", "fast_dllm_v2-gqa"]


@pytest.mark.parametrize("folder", ["llada-mha", "llada_moe-mha", "dream-gqa", *BLOCK_DIFFUSION])
def test_flex_attention_equals_sdpa(folder):
    # flex's kernel wants head sizes from 16 on
    inputs = {name: value.cuda() for name, value in left_pad([[5, 6, 7, 8, 9, 10], [11, 12]]).items()}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, flex = (
            load(folder, attn_implementation=name)(**inputs).logits for name in ("sdpa", "flex_attention")
        )
    torch.testing.assert_close(flex[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", BLOCK_DIFFUSION)
def test_block_diffusion_trains_the_same_with_flex_attention(folder):
    torch.manual_seed(0)
    clean = torch.randint(0, 290, (2, 32), device="cuda")
    masked = torch.rand(clean.shape, device="cuda") < 0.5
    inputs = {"input_ids": clean.masked_fill(masked, 300), "labels": clean.masked_fill(~masked, -100)}
    inputs["position_ids"] = torch.cat([torch.arange(13), torch.arange(19)]).expand(2, -1).cuda()
    found = []
    for name in ("sdpa", "flex_attention"):
        model = load(folder, attn_implementation=name)
        loss = model(**inputs).loss
        loss.backward()
        gradients = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    (expected, wanted), (loss, gradient) = found
    assert abs(loss - expected) < 1e-5
    assert (gradient - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("folder", sorted({folder.name for folder, _ in CASES}))
def test_drafts_change_no_token_on_kernels_and_graphs(folder):
    model, inputs = load(folder, dtype=torch.float32), left_pad([[5, 6, 7, 8, 9, 10], [11, 12]])
    inputs = {name: value.cuda() for name, value in inputs.items()}
    for policy in model.cache_policies:
        options = {"cache_policy": policy, "max_new_tokens": 24, "remasking_strategy": "low_confidence_static"}
        alone = model.diffusion_generate(**inputs, **options)
        for drafts in (4, 4, 4, "auto"):  # as it is, captured, replayed
            assert torch.equal(model.diffusion_generate(**inputs, draft_steps=drafts, **options), alone), policy


@pytest.mark.parametrize("folder", ["llada-mha", "sdar_moe-b4"])
def test_auto_measures_what_drafts_cost_and_draws_nothing(folder):
    model = load(folder, dtype=torch.bfloat16)
    fused = fused_of(model)[0]
    state, times = torch.cuda.get_rng_state(), pass_times(model, fused, [32, 64, 1024])
    assert 0 < times[0] and max(times) < 1000
    assert torch.equal(torch.cuda.get_rng_state(), state)
    options = model.resolve_options(None, {"cache_policy": "dual" if "dual" in model.cache_policies else "block"})
    tokens = tokens_of_step(model, options, (1, 100))
    possible = {(0, None), *((4, tokens * number) for number in range(2, 6))}
    assert room_for_drafts("auto", model, fused, options, (1, 100)) in possible


@pytest.mark.parametrize("length", [4, 32])
def test_self_speculation_gives_the_tokens_of_autoregressive_decoding_on_kernels_and_graphs(length):
    model, inputs = load("nemotron_labs_diffusion-gqa", dtype=torch.float32), left_pad([[5, 6, 7, 8, 9, 10], [11, 12]])
    inputs = {name: value.cuda() for name, value in inputs.items()}
    options = {"max_new_tokens": 40, "eos_token_id": []}
    plain = model.diffusion_generate(**inputs, block_length=1, disable_compile=True, **options)
    for _ in range(3):  # as it is, captured, replayed
        found = model.diffusion_generate(**inputs, block_length=length, self_speculation=True, **options)
        assert torch.equal(found, plain)


def test_sampling_with_a_generator_on_the_gpu_is_reproducible():
    model, prompt = load("llada-mha"), torch.tensor([[1, 2, 3]], device="cuda")
    runs = [
        model.diffusion_generate(
            prompt, max_new_tokens=16, temperature=1.0, generator=torch.Generator("cuda").manual_seed(0)
        )
        for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("policy", ["prefix", "dual"])
def test_bfloat16_decodes_on_the_gpu(policy):
    model = load("llada-mha", dtype=torch.bfloat16)
    inputs = {name: value.cuda() for name, value in left_pad([[5, 6, 7, 8], [9]]).items()}
    tokens = model.diffusion_generate(**inputs, max_new_tokens=20, block_length=8, cache_policy=policy)
    assert tokens.shape == (2, 24) and not (tokens == 300).any()
