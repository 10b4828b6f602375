"""Graphs and their buffers from one call to the next: conversations, interruptions, models that changed."""

import copy
import gc
import weakref

import pytest
import torch

from dllm_hf.generation import decoder, graphs, mixin, pool
from dllm_hf.generation.cache import column_bytes_of

from ..builders import left_pad
from .recorded_graphs import DEVICE, ROWS, both_ways, fresh_model

pytestmark = pytest.mark.usefixtures("captured")


@pytest.mark.parametrize("family", ["sdar", "gla_dream"])
def test_a_conversation_goes_on_in_the_cache_s_own_graphs(family, captured):
    model = fresh_model(family)
    options = {"max_new_tokens": 12, "block_length": 4, "return_dict_in_generate": True}

    def talk(**more):
        text, past, turns = torch.tensor([[5, 6, 7]], device=DEVICE), None, []
        for turn in range(4):
            output = model.diffusion_generate(text, past_key_values=past, **options, **more)
            turns.append(output.sequences.tolist())
            text = torch.cat([output.sequences, torch.tensor([[30 + turn] * 3], device=DEVICE)], dim=1)
            past = output.past_key_values
        return turns, past

    plain, _ = talk(disable_compile=True)
    fast, cache = talk()
    assert fast == plain and captured
    # Another conversation leaves the first one's cache alone.
    before = [layer.keys.clone() for layer in cache.layers] if family == "sdar" else []
    assert talk()[0] == plain
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, cache.layers))


def test_a_cache_moves_between_the_paths():
    model = fresh_model("sdar")
    options = {"max_new_tokens": 8, "return_dict_in_generate": True}
    text = torch.tensor([[5, 6, 7]], device=DEVICE)
    expected = None
    for order in ([True] * 3, [False] * 3, [True, False, True], [False, True, False]):
        sequences, past = text, None
        for plain in order:
            output = model.diffusion_generate(sequences, past_key_values=past, disable_compile=plain, **options)
            sequences, past = output.sequences, output.past_key_values
        expected = expected or sequences.tolist()
        assert sequences.tolist() == expected


def test_graphs_of_a_cache_that_nobody_keeps_serve_the_next_call(captured):
    model = fresh_model("sdar")
    numbers = []
    for _ in range(4):
        text = torch.tensor([[5, 6, 7]], device=DEVICE)
        model.diffusion_generate(text, max_new_tokens=8, return_dict_in_generate=True)
        numbers.append(len(captured))
    assert numbers[1] == numbers[2] == numbers[3] > 0


def test_a_conversation_goes_on_after_an_interrupted_turn():
    model = fresh_model("sdar", max_position_embeddings=600)
    options = {"return_dict_in_generate": True, "denoising_steps": 2}
    first = model.diffusion_generate(torch.tensor([[5, 6, 7]], device=DEVICE), max_new_tokens=12, **options)

    class Interrupt:
        def put(self, value):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.diffusion_generate(
            first.sequences, past_key_values=first.past_key_values, max_new_tokens=8, streamer=Interrupt()
        )
    for number in (8, 300):  # the second needs longer buffers
        got = model.diffusion_generate(
            first.sequences, past_key_values=first.past_key_values, max_new_tokens=number, **options
        )
        expected = model.diffusion_generate(first.sequences, max_new_tokens=number, disable_compile=True, **options)
        assert got.sequences.equal(expected.sequences)


def test_a_copied_cache_goes_its_own_way():
    model = fresh_model("sdar")
    options = {"max_new_tokens": 8, "return_dict_in_generate": True}
    first = model.diffusion_generate(torch.tensor([[5, 6, 7]], device=DEVICE), **options)
    branches = [first.past_key_values, copy.deepcopy(first.past_key_values)]
    for token, branch in zip((30, 31), branches):
        text = torch.cat([first.sequences, torch.tensor([[token]], device=DEVICE)], dim=1)
        got = model.diffusion_generate(text, past_key_values=branch, **options).sequences
        assert got.equal(model.diffusion_generate(text, disable_compile=True, **options).sequences)


def test_checking_every_few_steps_changes_nothing_but_the_passes():
    model = fresh_model("sdar")
    options = {"max_new_tokens": 16, "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.05}
    each = both_ways(model, **options)
    some = both_ways(model, check_interval=3, **options)
    assert some.sequences.equal(each.sequences) and some.tokens_per_forward.equal(each.tokens_per_forward)
    assert some.num_forward_passes > each.num_forward_passes


def test_changed_weights_are_seen():
    model = fresh_model("llada")
    options = {"max_new_tokens": 12, "block_length": 4, "cache_policy": "dual"}
    before = both_ways(model, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # in place, as an optimiser does
    both_ways(model, **options)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    assert not both_ways(model, **options).sequences.equal(before.sequences)


def test_a_step_that_cannot_be_captured_runs_without_a_graph(monkeypatch):
    def refuse(*args):
        tries.append(args)
        raise RuntimeError("operation not permitted when stream is capturing")

    tries = []
    monkeypatch.setattr(graphs, "capture", refuse)
    both_ways(fresh_model("llada"), max_new_tokens=12, block_length=4, cache_policy="prefix")
    assert len(tries) == 1  # a memory pool in which a capture has failed cannot be used again


@pytest.mark.gpu
@pytest.mark.parametrize("family, policy", [("llada", "dual"), ("sdar", "block"), ("gla_dream", "block")])
def test_compiled_steps_give_the_same_tokens(family, policy, captured):
    model = fresh_model(family)
    inputs = {name: tensor.to(DEVICE) for name, tensor in left_pad(ROWS).items()}
    options = {"max_new_tokens": 12, "block_length": 4, "cache_policy": policy}
    plain = model.diffusion_generate(**inputs, **options, disable_compile=True)
    assert model.diffusion_generate(**inputs, **options, torch_compile=True).tolist() == plain.tolist()
    assert captured


def test_a_model_takes_its_graphs_with_it():
    model = fresh_model("llada")
    model.diffusion_generate(torch.tensor([[5, 6]], device=DEVICE), max_new_tokens=8, cache_policy="dual")
    kept = weakref.ref(pool._idle[model][0])
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("family", ["llada", "sdar", "gla_dream"])
def test_memory_is_given_back_at_once(family):
    """Graphs too: NCCL waits for those that use a group before it ends it, for ever where they wait for the collector."""
    model = fresh_model(family)
    options = {"max_new_tokens": 8, "block_length": 4, "cache_policy": "dual" if family == "llada" else "block"}
    model.diffusion_generate(torch.tensor([[5, 6]], device=DEVICE), **options)
    (workspace,) = pool._idle[model]
    kept = [weakref.ref(each) for each in (workspace, workspace.canvas, workspace.graphs)]
    del workspace
    model.release_graphs()
    assert [each() for each in kept] == [None] * 3


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("options", [{}, {"disable_compile": True}, {"cache_policy": "none"}, {"output_history": True}])
def test_what_a_call_used_is_free_when_it_has_returned(options, monkeypatch):
    made = []

    class Noted(pool.Workspace):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(mixin, "Workspace", Noted)
    model = fresh_model("sdar")
    model.diffusion_generate(torch.tensor([[5, 6]], device=DEVICE), max_new_tokens=8, block_length=4, **options)
    model.release_graphs()
    assert [each() for each in made] == [None]


def test_graphs_of_a_cache_that_had_to_grow_are_not_used_again(captured):
    """Its buffers have moved."""
    model = fresh_model("sdar", max_position_embeddings=600)
    options = {"return_dict_in_generate": True, "denoising_steps": 1}
    first = model.diffusion_generate(torch.tensor([[5, 6, 7]], device=DEVICE), max_new_tokens=12, **options)
    second = model.diffusion_generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=300, **options
    )
    expected = model.diffusion_generate(first.sequences, max_new_tokens=300, disable_compile=True, **options)
    assert second.sequences.equal(expected.sequences)
    del first, second
    gc.collect()
    assert not pool._idle.get(model)


def test_a_conversation_grows_by_2000_tokens_without_a_capture(captured, monkeypatch):
    """There is room for it in a part of the memory that the weights take, of an 8B model half a GiB."""
    model = fresh_model("sdar", max_position_embeddings=4096)
    monkeypatch.setattr(pool, "SPARE", 3500 * column_bytes_of(model) / sum(each.nbytes for each in model.parameters()))
    options = {"return_dict_in_generate": True, "max_new_tokens": 8, "block_length": 4, "denoising_steps": 2}
    text, past, captures = torch.tensor([[5, 6, 7, 8]], device=DEVICE), None, []
    for _ in range(6):
        output = model.diffusion_generate(text, past_key_values=past, **options)
        past, captures = output.past_key_values, [*captures, len(captured)]
        turn = torch.randint(9, 50, (1, 500), generator=torch.Generator().manual_seed(len(captures))).to(DEVICE)
        text = torch.cat([output.sequences, turn], dim=1)
    assert output.sequences.shape[1] > 2500 and captures[-1] == captures[0] > 0
    expected = model.diffusion_generate(output.sequences[:, :-8], disable_compile=True, **options)
    assert output.sequences.equal(expected.sequences)


def test_the_number_of_caches_and_of_graphs_is_bounded(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 4)
    model = fresh_model("llada")
    for batch in range(1, 5):
        prompt = torch.full((batch, 3), 5, device=DEVICE)
        model.diffusion_generate(prompt, max_new_tokens=24, block_length=3, cache_policy="prefix")
    kept = pool._idle[model]
    assert len(kept) == pool.MAX_IDLE
    assert all(len(each.graphs.steps) == graphs.MAX_GRAPHS for each in kept)


@pytest.mark.parametrize("hook", ["tokens", "logits"])
def test_hooks_see_every_step_as_before(hook, captured):
    model, seen = fresh_model("llada"), []

    def note(step, sequences, logits):
        seen.append(step)
        return sequences if hook == "tokens" else logits

    prompt = torch.tensor([[5, 6]], device=DEVICE)
    model.diffusion_generate(prompt, max_new_tokens=8, cache_policy="dual", **{f"generation_{hook}_hook_func": note})
    assert len(seen) >= 8 and not captured


@pytest.mark.parametrize("family", ["llada", "gla_dream"])
def test_a_model_with_a_hook_on_a_layer_runs_its_hook(family, captured):
    model, calls = fresh_model(family), []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    policy = model.cache_policies[-1] if family == "llada" else "block"
    output = model.diffusion_generate(
        torch.tensor([[5, 6]], device=DEVICE), max_new_tokens=8, cache_policy=policy, return_dict_in_generate=True
    )
    assert len(calls) == output.num_forward_passes and not captured


@pytest.mark.parametrize("family", ["llada", "gla_dream"])
def test_an_adapter_that_is_switched_off_is_off(family):
    peft = pytest.importorskip("peft")
    model = fresh_model(family)
    model.add_adapter(peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    options = {"max_new_tokens": 12, "block_length": 4, "cache_policy": "dual" if family == "llada" else "block"}
    both_ways(model, **options)
    model.disable_adapters()
    both_ways(model, **options)


def test_under_autocast_no_graph_reads_weights_that_autocast_has_copied(captured):
    model = fresh_model("llada")
    options = {"max_new_tokens": 12, "block_length": 4, "cache_policy": "dual"}
    with torch.autocast(DEVICE, torch.bfloat16):
        both_ways(model, **options)
    assert not captured
    both_ways(model, **options)


def test_calls_in_and_out_of_inference_mode():
    model = fresh_model("sdar")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            both_ways(model, max_new_tokens=12)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_recurrent_cache_that_changed_between_turns_is_read_as_it_is(shift):
    model = fresh_model("gla_dream", logits_shift=shift)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True}
    texts = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]], device=DEVICE)

    def talk(rows, **more):
        first = model.diffusion_generate(texts, **options, **more)
        cache = first.past_key_values
        cache.batch_select_indices(torch.tensor(rows))
        longer = torch.cat([first.sequences[rows], texts[: len(rows)]], dim=1)
        return model.diffusion_generate(longer, past_key_values=cache, **options, **more).sequences.tolist()

    for rows in ([1, 0], [1], [0, 0, 1][:2]):
        assert talk(rows) == talk(rows, disable_compile=True)


def test_retired_graphs_are_not_kept():
    model = fresh_model("sdar", max_position_embeddings=600)
    options = {"return_dict_in_generate": True, "denoising_steps": 1}
    first = model.diffusion_generate(torch.tensor([[5, 6, 7]], device=DEVICE), max_new_tokens=12, **options)
    old = weakref.ref(first.past_key_values.workspace)
    second = model.diffusion_generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=300, **options
    )
    del first, second
    gc.collect()
    assert old() is None and not pool._idle.get(model)


def test_steps_share_the_memory_of_their_noise():
    model, numbers = fresh_model("dream"), []
    for temperature in (1.0, 0.7):
        both_ways(
            model, max_new_tokens=8, block_length=4, cache_policy="dual", temperature=temperature, denoising_steps=3
        )
        (kept,) = pool._idle[model]
        numbers.append((len(kept.graphs.steps), len(kept.graphs.noise)))
    assert numbers[0] == numbers[1]  # a temperature is a number in a table, and no key
    assert len(kept.graphs.noise) <= len({inputs.window.block.shape for inputs, *_ in kept.graphs.steps.values()})


RECURRENT = [{"attn_mode": "torch"}, {"block_size": 65}, {"block_size": 65, "logits_shift": 1}, {"logits_shift": 1}]


@pytest.mark.parametrize("changes", RECURRENT, ids=str)
def test_a_recurrent_model_computes_nothing_but_its_prompt_outside_of_its_steps(changes, captured, monkeypatch):
    model = fresh_model("gla_dream", max_position_embeddings=512, **changes)
    size, rows = model.config.block_size, torch.tensor([[5, 6, 7]], device=DEVICE)
    options = {"denoising_steps": 2, "logits_eos_inf": True}
    text, plain = (
        model.diffusion_generate(rows, max_new_tokens=6 * size - 3, disable_compile=disabled, **options)
        for disabled in (False, True)
    )
    assert torch.equal(text, plain)
    passes, run, compute = [], graphs.StepGraphs.run, decoder.denoise
    monkeypatch.setattr(decoder, "denoise", lambda *args: (passes.append("pass"), compute(*args))[1])
    monkeypatch.setattr(graphs.StepGraphs, "run", lambda *args: (passes.append("graph"), run(*args))[1])
    model.diffusion_generate(text[:, : 3 * size + 1], max_new_tokens=3 * size - 1, **options)
    # The prompt is a pass by itself; the others are graphs, of which some run as a pass: the first time, and captured.
    assert passes[0] == "pass" and passes.count("graph") == 5 and passes[1] == "graph"


class Interruption:
    """A streamer that stops the call after its first tokens."""

    puts = 0

    def put(self, tokens):
        self.puts += 1
        if self.puts > 3:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError("the call was to be interrupted")


@pytest.mark.parametrize("disabled", [True, False], ids=["plain", "fast"])
@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_nothing_goes_on_by_hand_after_an_interrupted_turn(mode, disabled):
    model = fresh_model("gla_dream", attn_mode=mode)
    options = {"disable_compile": disabled, "return_dict_in_generate": True}
    first = model.diffusion_generate(torch.tensor([[5, 6, 7, 8]], device=DEVICE), max_new_tokens=8, **options)
    cache = first.past_key_values
    with pytest.raises(KeyboardInterrupt):
        model.diffusion_generate(
            first.sequences, past_key_values=cache, max_new_tokens=16, streamer=Interruption(), **options
        )
    with pytest.raises(ValueError, match="did not end"):
        model(first.sequences, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("disabled", [True, False], ids=["plain", "fast"])
@torch.no_grad()
def test_what_waited_by_hand_is_forgotten_by_the_next_turn(disabled):
    model = fresh_model("gla_dream")
    options = {"max_new_tokens": 8, "disable_compile": disabled, "return_dict_in_generate": True}
    text = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    cache = model.diffusion_generate(text, **options).past_key_values
    model(text[:, :2], past_key_values=cache, use_cache=True)
    output = model.diffusion_generate(text, past_key_values=cache, **options)
    cache, seen = output.past_key_values, output.past_key_values.get_seq_length()
    got = model(output.sequences[:, seen:], past_key_values=cache, use_cache=True).logits
    expected = model(output.sequences, use_cache=False).logits[:, seen:]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


RESET, SELECT = lambda cache: cache.reset(), lambda cache: cache.batch_select_indices(torch.tensor([1, 0]))


@pytest.mark.parametrize("change", [RESET, SELECT], ids=["reset", "rows selected"])
def test_a_cache_whose_tensors_moved_is_not_used_again(change):
    model, texts = fresh_model("gla_dream"), torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]], device=DEVICE)
    options = {"max_new_tokens": 15, "block_length": 4, "return_dict_in_generate": True}
    expected = model.diffusion_generate(texts, disable_compile=True, **options).sequences
    for _ in range(3):
        output = model.diffusion_generate(texts, **options)
        assert torch.equal(output.sequences, expected)
        change(output.past_key_values)
        del output
        gc.collect()


@pytest.mark.parametrize("family", ["sdar", "gla_dream"])
@pytest.mark.parametrize("disabled", [True, False], ids=["plain", "fast"])
def test_a_conversation_begun_in_inference_mode_is_refused_outside(family, disabled):
    model = fresh_model(family)
    options = {"max_new_tokens": 8, "disable_compile": disabled, "return_dict_in_generate": True}
    with torch.inference_mode():
        first = model.diffusion_generate(torch.tensor([[5, 6, 7, 8]], device=DEVICE), **options)
        text = first.sequences.clone()
        model.diffusion_generate(text, past_key_values=first.past_key_values, **options)
    with pytest.raises(ValueError, match="`past_key_values` was made under `torch.inference_mode"):
        model.diffusion_generate(first.sequences, past_key_values=first.past_key_values, **options)


def test_a_recurrent_model_that_returns_tuples_is_captured_all_the_same(captured):
    model = fresh_model("gla_dream", attn_mode="torch", return_dict=False)
    both_ways(model, max_new_tokens=12)
    assert captured


@pytest.mark.parametrize("changes, number", [({"attn_mode": "torch"}, 12), ({"block_size": 65}, 70)], ids=str)
def test_a_recurrent_model_that_the_kernel_does_not_know_is_captured_as_it_is(changes, number, captured):
    model = fresh_model("gla_dream", max_position_embeddings=256, **changes)
    both_ways(model, max_new_tokens=number, steps=number // 6)
    both_ways(model, max_new_tokens=12, cfg_scale=1.5)
    assert captured


@pytest.mark.parametrize(
    "name, value", [("gate_logit_normalizer", 2), ("inter_block_injection_mode", "boundary"), ("attn_mode", "torch")]
)
def test_a_configuration_that_changed_is_obeyed(name, value, captured):
    model = fresh_model("gla_dream")
    both_ways(model, max_new_tokens=12)
    before = len(captured)
    setattr(model.config, name, value)
    both_ways(model, max_new_tokens=12)
    assert len(captured) > before


def test_a_layer_that_was_patched_between_calls_is_run_as_it_is():
    model = fresh_model("gla_dream")
    both_ways(model, max_new_tokens=12)
    for layer in model.model.layers:
        layer.self_attn._injected = lambda *arguments: (0.0, 0.0)
    both_ways(model, max_new_tokens=12)


def test_a_prompt_in_pieces_asks_for_no_logits_of_them():
    both_ways(fresh_model("sdar_moe"), rows=[list(range(5, 45)), [5, 6]], max_new_tokens=8, prefill_chunk_size=8)
