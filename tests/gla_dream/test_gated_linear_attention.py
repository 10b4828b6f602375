"""Every form of gated linear attention computes the recurrence: outputs, final states and gradients."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf import GLADreamModel
from dllm_hf.gla_dream import gated_linear_attention as module
from dllm_hf.gla_dream.gated_linear_attention import (
    MIN_LOG_DECAY,
    MODES,
    block_states,
    check_installed,
    check_mode,
    chunk_gla,
    gated_linear_attention,
    implementation,
    recurrent_gla,
)

from ..builders import gla_dream_config
from .oracles import DECAYS, LENGTHS, TOLERANCES, assert_near, gla_by_definition, results, scan_inputs


def in_float64(inputs) -> dict[str, torch.Tensor]:
    return {name: x.double() for name, x in inputs.items()}


both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
with_and_without_state = pytest.mark.parametrize("with_state", [False, True], ids=["from zero", "from a state"])


@both_directions
@with_and_without_state
def test_the_recurrence_is_its_definition_multiplied_out(with_state, reverse):
    inputs = in_float64(scan_inputs(13, with_state=with_state, key_dim=6, value_dim=10))
    expected = results(gla_by_definition, inputs, reverse=reverse)
    assert_near(results(recurrent_gla, inputs, reverse=reverse), expected, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@both_directions
@with_and_without_state
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_chunked_form_is_the_recurrence(length, decays, with_state, reverse, dtype):
    inputs = scan_inputs(length, decays, with_state, dtype)
    expected = results(recurrent_gla, in_float64(inputs), reverse=reverse)
    assert_near(results(chunk_gla, inputs, reverse=reverse), expected, TOLERANCES[dtype])


@settings(max_examples=30)
@given(
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    sizes=st.fixed_dictionaries(
        {"heads": st.integers(1, 3), "key_dim": st.integers(1, 9), "value_dim": st.integers(1, 9)}
    ),
    decays=st.sampled_from(list(DECAYS)),
    reverse=st.booleans(),
)
def test_a_scan_may_be_cut_in_two_anywhere_where_the_state_is_handed_on(lengths, sizes, decays, reverse):
    inputs = scan_inputs(sum(lengths), decays, **sizes)
    parts = [dict(zip(inputs, part)) for part in zip(*(x.split(lengths, dim=1) for x in inputs.values()))]
    first, second = reversed(parts) if reverse else parts
    one, state = chunk_gla(**first, reverse=reverse)
    other, state = chunk_gla(**second, initial_state=state, reverse=reverse)
    output, final = chunk_gla(**inputs, reverse=reverse)
    cut = {"output": torch.cat([other, one] if reverse else [one, other], dim=1), "state": state}
    assert_near(cut, {"output": output, "state": final}, 1e-5)


@pytest.mark.parametrize("scan", [chunk_gla, recurrent_gla])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_output_has_the_type_of_the_values_and_the_state_is_at_least_float32(scan, dtype):
    output, state = scan(**scan_inputs(5, dtype=dtype))
    assert output.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def outputs(scan, inputs, **options) -> dict[str, torch.Tensor]:
    """Output and final state, after a look at the gradients."""
    found = results(scan, inputs, **options)
    assert all(x.isfinite().all() for x in found.values())
    return {name: found[name] for name in ("output", "state")}


@pytest.mark.parametrize("scan", [chunk_gla, recurrent_gla])
@with_and_without_state
def test_a_final_state_that_nobody_wants_is_none(scan, with_state):
    inputs = scan_inputs(5, with_state=with_state)
    output, state = scan(**inputs, output_final_state=False)
    assert state is None
    torch.testing.assert_close(output, scan(**inputs)[0], atol=0, rtol=0)


@both_directions
@pytest.mark.parametrize("dtype", [torch.float16, *TOLERANCES], ids=str)
def test_a_decay_below_the_clamp_is_the_clamp_and_overflows_nowhere(dtype, reverse):
    inputs = scan_inputs(70, with_state=True, dtype=dtype)
    inputs["log_decay"][:, ::3] = -1e4
    clamped = {**inputs, "log_decay": inputs["log_decay"].clamp(min=MIN_LOG_DECAY)}
    assert_near(outputs(chunk_gla, inputs, reverse=reverse), outputs(chunk_gla, clamped, reverse=reverse), 0)


@both_directions
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_large_inputs_overflow_nowhere(dtype, decays, reverse):
    inputs = scan_inputs(70, decays, with_state=True, dtype=dtype)
    inputs |= {name: inputs[name] * 1e8 for name in ("query", "key", "value", "initial_state")}
    expected = outputs(recurrent_gla, in_float64(inputs), reverse=reverse)
    assert_near(outputs(chunk_gla, inputs, reverse=reverse), expected, TOLERANCES[dtype])


# --- the recurrence over blocks


def states_by_definition(updates, log_decays, initial_state=None, samples=None):
    state = torch.zeros_like(updates[:, 0]) if initial_state is None else initial_state
    before = []
    for block in range(updates.shape[1]):
        if samples is not None:
            earlier = samples[:, block - 1] if block else torch.zeros_like(samples[:, 0])
            state = torch.where((samples[:, block] == earlier)[:, None, None, None], state, 0)
        before.append(state)
        state = log_decays[:, block].exp()[..., None] * state + updates[:, block]
    return torch.stack([*before, state], dim=1)


def block_inputs(blocks, decay=1.0, with_state=False, batch=2):
    generator = torch.Generator().manual_seed(blocks)
    inputs = {
        "updates": torch.randn(batch, blocks, 2, 3, 4, generator=generator),
        "log_decays": -decay * torch.rand(batch, blocks, 2, 3, generator=generator),
    }
    if with_state:
        inputs["initial_state"] = torch.randn(batch, 2, 3, 4, generator=generator)
    return inputs


def all_states(**inputs):
    before, last = block_states(**inputs)
    return torch.cat([before, last[:, None]], dim=1)


@pytest.mark.parametrize("decay", [1e-3, 1.0, 40.0])
@with_and_without_state
@pytest.mark.parametrize("blocks", [1, 2, 16, 17, 50])
def test_the_states_of_all_blocks_at_once_are_those_of_one_after_the_other(blocks, with_state, decay):
    inputs = block_inputs(blocks, decay, with_state)
    expected = states_by_definition(**in_float64(inputs))
    assert_near({"states": all_states(**inputs)}, {"states": expected}, 1e-5)


@pytest.mark.parametrize("decay", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("blocks", [1, 2, 16, 17, 50])
def test_so_are_their_gradients(blocks, decay):
    inputs = block_inputs(blocks, decay, with_state=True)
    together = results(lambda **inputs: [all_states(**inputs)] * 2, inputs)
    assert_near(together, results(lambda **inputs: [states_by_definition(**inputs)] * 2, in_float64(inputs)), 1e-5)


@settings(max_examples=40)
@given(data=st.data())
def test_the_first_block_of_a_sample_starts_from_zero(data):
    blocks = data.draw(st.integers(1, 12))
    rows = st.lists(st.integers(0, 1), min_size=blocks, max_size=blocks)
    samples = torch.tensor(data.draw(st.lists(rows, min_size=2, max_size=2))).cumsum(-1)
    inputs = in_float64(block_inputs(blocks, with_state=data.draw(st.booleans())))
    group = data.draw(st.integers(1, 12))
    together = lambda **inputs: [all_states(**inputs, samples=samples, group=group)] * 2
    expected = lambda **inputs: [states_by_definition(**inputs, samples=samples)] * 2
    assert_near(results(together, inputs), results(expected, inputs), 1e-12)


def test_of_the_largest_tensors_the_states_alone_are_kept_for_the_gradients():
    inputs = {name: x.requires_grad_() for name, x in block_inputs(40).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        before, _ = block_states(**inputs)
    assert sum(x.numel() for x in kept) == before.numel() + inputs["log_decays"].numel()


# --- which implementation runs


@pytest.mark.parametrize("mode, function", [("torch", chunk_gla), ("naive", recurrent_gla)])
def test_our_own_implementations_have_their_names(mode, function):
    assert implementation(mode, torch.zeros(1)) is function


def test_what_is_chosen_by_itself_runs_on_a_cpu():
    inputs = scan_inputs(5)
    expected = dict(zip(("output", "state"), recurrent_gla(**inputs)))
    assert_near(dict(zip(("output", "state"), gated_linear_attention(**inputs))), expected, 1e-5)


@pytest.mark.parametrize(
    "scans, dtype, is_installed, is_trained, function",
    [
        (8, torch.bfloat16, True, True, module._fla_fused_recurrent),
        (8, torch.bfloat16, True, False, module._fla_fused_recurrent),
        (4096, torch.bfloat16, True, True, module._fla_chunk),
        (4096, torch.bfloat16, True, False, chunk_gla),
        (8, torch.float32, True, True, chunk_gla),
        (8, torch.bfloat16, False, True, chunk_gla),
    ],
    ids=["few scans", "few scans, no gradients", "many scans", "many scans, no gradients", "float32", "not installed"],
)
def test_what_is_chosen_by_itself_on_a_gpu(monkeypatch, scans, dtype, is_installed, is_trained, function):
    monkeypatch.setattr(module, "fla_kernels", lambda: object() if is_installed else None)
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(scans // 4, 32, 4, 64))
    with torch.set_grad_enabled(is_trained):
        assert implementation("auto", on_a_gpu) is function


@pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
def test_the_kernels_of_fla_are_refused_on_a_cpu(mode):
    with pytest.raises(ValueError, match=f"attn_mode='{mode}'.*on cpu.*attn_mode='auto'"):
        gated_linear_attention(**scan_inputs(5), mode=mode)


@pytest.mark.parametrize("kernel", ["_fla_chunk", "_fla_fused_recurrent"])
@both_directions
@with_and_without_state
def test_the_kernels_of_fla_are_called_as_they_want_it(monkeypatch, kernel, with_state, reverse):
    """With stand-ins that have their signatures: one of the two cannot scan in reverse."""

    def fused_recurrent(q, k, v, gk, *, initial_state, output_final_state, reverse):
        return recurrent_gla(q, k, v, gk, initial_state, reverse)

    monkeypatch.setattr(module, "fla_kernels", lambda: (chunk_of_fla, fused_recurrent))
    inputs = scan_inputs(9, with_state=with_state)
    expected = results(recurrent_gla, inputs, reverse=reverse)
    assert_near(results(getattr(module, kernel), inputs, reverse=reverse), expected, 1e-6)


def chunk_of_fla(q, k, v, g, *, initial_state, output_final_state):
    return recurrent_gla(q, k, v, g, initial_state)


@with_and_without_state
def test_the_chunked_kernels_are_given_no_more_scans_than_a_grid_takes(monkeypatch, with_state):
    """A pass over whole texts of 256 rows has more: `invalid argument`, says CUDA."""
    launched = []

    def noted(q, *rest, **options):
        launched.append(len(q))
        return chunk_of_fla(q, *rest, **options)

    monkeypatch.setattr(module, "fla_kernels", lambda: (noted, None))
    monkeypatch.setattr(module, "LARGEST_GRID", 7)
    inputs = scan_inputs(3, with_state=with_state, batch=8)  # two heads each
    expected = results(recurrent_gla, inputs)
    assert_near(results(module._fla_chunk, inputs), expected, 1e-6)
    assert launched == [3, 3, 2]
    assert module._fla_chunk(**inputs, output_final_state=False)[1] is None


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_that_is_listed_exists(mode):
    check_mode(mode)


@pytest.mark.parametrize(
    "mode, remedy",
    [("fused_chunk", "use 'chunk'"), ("chunked", "auto, torch, naive, chunk, fused_recurrent")],
)
def test_a_mode_that_does_not_exist_comes_with_those_that_do(mode, remedy):
    with pytest.raises(ValueError, match=f"attn_mode='{mode}'.*{remedy}"):
        check_mode(mode)


@pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
def test_a_kernel_of_fla_that_is_not_installed_is_refused_with_what_to_install(monkeypatch, mode):
    monkeypatch.setattr(module, "fla_kernels", lambda: None)
    for refused in (lambda: check_installed(mode), lambda: GLADreamModel(gla_dream_config(attn_mode=mode))):
        with pytest.raises(ValueError, match=rf"attn_mode='{mode}'.*pip install 'dllm-hf\[fla\]'.*attn_mode='auto'"):
            refused()


@pytest.mark.parametrize("mode", ["auto", "torch", "naive"])
def test_without_fla_the_other_modes_are_there(monkeypatch, mode):
    monkeypatch.setattr(module, "fla_kernels", lambda: None)
    check_installed(mode)
