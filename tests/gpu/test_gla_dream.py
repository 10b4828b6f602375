"""What only a GPU can show of GLADream: the kernels of flash-linear-attention, and the same numbers as on the CPU."""

import pytest
import torch

from dllm_hf.gla_dream.gated_linear_attention import FLA_MODES, MODES, chunk_gla, implementation, recurrent_gla

from ..builders import MASK, generate, left_pad, new_model
from ..gla_dream.conftest import INJECTIONS
from ..gla_dream.oracles import DECAYS, LENGTHS, TOLERANCES, assert_near, results, scan_inputs
from ..pairwise import pairwise

pytestmark = pytest.mark.gpu

ROW = [(7 * index + 3) % 59 for index in range(45)]
SIZES = {"hidden_size": 128, "block_size": 32}  # heads of 32: the kernels want 16 at least


@pytest.fixture(scope="module", autouse=True)
def exact_float32():
    """Before any kernel is compiled: else Triton multiplies float32 as tf32, which has three digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_F32_DEFAULT", "ieee")
        yield


@pytest.fixture(scope="module", autouse=True)
def one_configuration_of_each_kernel():
    """Instead of compiling and timing dozens for each shape, which takes an hour. What a kernel computes does not
    depend on it."""
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    every = autotuner.prune_configs

    def fewest(self, kwargs):
        # The least shared memory, so that it fits in float32 too.
        size = lambda config: (config.num_stages, sum(v for v in config.kwargs.values() if isinstance(v, int)))
        return sorted(every(self, kwargs), key=size)[:1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotuner, "prune_configs", fewest)
        yield


def model_on_the_gpu(mode: str, **changes):
    if mode in FLA_MODES:
        pytest.importorskip("fla")
    return new_model("gla_dream", attn_mode=mode, **{**SIZES, **changes}).cuda()


@pytest.mark.parametrize(
    "length, decays, mode, with_state, reverse, dtype",
    pairwise(LENGTHS, DECAYS, FLA_MODES, (False, True), (False, True), TOLERANCES),
)
def test_a_kernel_of_fla_is_the_recurrence(mode, length, decays, with_state, reverse, dtype):
    pytest.importorskip("fla")
    inputs = scan_inputs(length, decays, with_state, dtype, device="cuda", key_dim=32, value_dim=64)
    expected = results(recurrent_gla, {name: x.double() for name, x in inputs.items()}, reverse=reverse)
    assert_near(results(implementation(mode, inputs["query"]), inputs, reverse=reverse), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("mode", FLA_MODES)
def test_a_kernel_of_fla_takes_more_scans_than_a_grid(mode):
    """As many as a pass over whole texts of 256 rows has."""
    pytest.importorskip("fla")
    sizes = {"batch": 16400, "heads": 4, "key_dim": 16, "value_dim": 16}
    inputs = scan_inputs(8, with_state=True, dtype=torch.bfloat16, device="cuda", **sizes)
    expected = results(chunk_gla, {name: x.float() for name, x in inputs.items()})
    assert_near(results(implementation(mode, inputs["query"]), inputs), expected, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("length, decays, reverse, dtype", pairwise(LENGTHS, DECAYS, (False, True), TOLERANCES))
def test_the_chunked_form_is_the_recurrence(length, decays, reverse, dtype):
    inputs = scan_inputs(length, decays, True, dtype, device="cuda")
    expected = results(recurrent_gla, {name: x.double() for name, x in inputs.items()}, reverse=reverse)
    assert_near(results(chunk_gla, inputs, reverse=reverse), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "naive"])
@torch.no_grad()
def test_every_implementation_gives_the_same_logits(mode, injection):
    batch = {name: x.cuda() for name, x in left_pad([ROW, ROW[:33], ROW[:2]]).items()}
    real = batch["attention_mask"] == 1
    found, expected = (
        model_on_the_gpu(name, inter_block_injection_mode=injection)(**batch).logits[real] for name in (mode, "naive")
    )
    assert_near({"logits": found}, {"logits": expected}, 1e-4)


@pytest.mark.parametrize("policy", ["block", "none"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "naive"])
def test_every_implementation_gives_the_same_tokens(mode, policy):
    batch = {name: x.cuda() for name, x in left_pad([ROW, ROW[:33]]).items()}
    found, expected = (
        model_on_the_gpu(name).diffusion_generate(**batch, max_new_tokens=40, cache_policy=policy, eos_token_id=[])
        for name in (mode, "naive")
    )
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_every_implementation_gives_the_same_gradients(mode):
    tokens = torch.tensor([ROW, ROW[::-1]])
    noisy = tokens.masked_fill(torch.arange(45) % 3 == 0, MASK)
    labels = torch.where(noisy == MASK, tokens, -100)

    def gradients(model):
        model(noisy.to(model.device), labels=labels.to(model.device)).loss.backward()
        return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}

    assert_near(gradients(model_on_the_gpu(mode)), gradients(new_model("gla_dream", **SIZES)), 1e-3)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_gpu_gives_what_the_cpu_gives(mode):
    model, other = new_model("gla_dream", **SIZES), model_on_the_gpu(mode)
    tokens = torch.tensor([ROW])
    assert_near({"logits": other(tokens.cuda()).logits.cpu()}, {"logits": model(tokens).logits}, 1e-4)
    options = {"max_new_tokens": 20, "eos_token_id": []}
    expected = generate(model, [ROW], **options).sequences
    assert other.diffusion_generate(tokens.cuda(), **options).tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_decodes_and_trains(mode):
    model = model_on_the_gpu(mode).to(torch.bfloat16)
    tokens = torch.tensor([ROW, ROW[::-1]]).cuda()
    assert not (model.diffusion_generate(tokens, max_new_tokens=40) == MASK).any()
    model(tokens, labels=tokens.clone()).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
