"""Models and caches that several threads use at once."""

import gc
import threading

import pytest
import torch

from dllm_hf.kernels.ahead import without_collection

from ..builders import ScriptedModel, generate, new_model, script, tiny_model


class Gate:
    """Lets a thread wait inside of its forward pass until another has come to a place of its own."""

    def __init__(self):
        self.inside, self.may_go = threading.Event(), threading.Event()

    def __call__(self, *args, **kwargs):
        self.inside.set()
        assert self.may_go.wait(600)


def in_a_thread(run):
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_nothing_is_collected_until_the_last_that_must_not_be_disturbed_has_ended():
    gate = Gate()

    def capture():
        with without_collection():
            gate()

    with without_collection():
        thread = in_a_thread(capture)
        assert gate.inside.wait(600) and not gc.isenabled()
    assert not gc.isenabled()
    gate.may_go.set()
    thread.join(600)
    assert gc.isenabled()


def test_a_model_in_training_stays_without_dropout_until_the_last_call_has_ended():
    """The call that ends first must not switch dropout on under the other."""
    model = new_model("llada", attention_dropout=0.5).train()
    gate, modes = Gate(), []
    first = model.register_forward_pre_hook(gate)
    thread = in_a_thread(lambda: model.diffusion_generate(torch.tensor([[1]]), max_new_tokens=3, denoising_steps=1))
    assert gate.inside.wait(600)
    first.remove()
    model.register_forward_hook(lambda *args: modes.append(model.training))
    model.diffusion_generate(torch.tensor([[2]]), max_new_tokens=2)  # begins second, ends first
    assert not model.training
    gate.may_go.set()
    thread.join(600)
    assert model.training and all(module.training for module in model.modules())
    assert modes and not any(modes)


def test_the_mode_of_each_module_comes_back_also_after_an_error():
    model = ScriptedModel(script([1])).train()
    with pytest.raises(IndexError):
        model.diffusion_generate(torch.tensor([[1, 2]]), max_new_tokens=4)
    assert model.training


@pytest.mark.parametrize("family", ["sdar", "gla_dream"])
def test_a_cache_in_use_by_a_call_is_refused_to_another(family):
    model = tiny_model(family)
    options = {"max_new_tokens": 4, "disable_compile": True}
    turn = generate(model, [[1, 2, 3, 4, 5]], **options)
    text, cache = turn.sequences.tolist()[0], turn.past_key_values
    expected = generate(model, [[*text, 6]], **options).sequences.tolist()

    gate, answers = Gate(), []
    handle = model.register_forward_pre_hook(gate)
    thread = in_a_thread(lambda: answers.append(generate(model, [[*text, 6]], past_key_values=cache, **options)))
    try:
        assert gate.inside.wait(600)
        handle.remove()
        with pytest.raises(ValueError, match="`past_key_values` is in use by another call"):
            generate(model, [[*text, 7]], past_key_values=cache, **options)
    finally:
        gate.may_go.set()
        thread.join(600)
    assert answers[0].sequences.tolist() == expected
    following = [*expected[0], 8]
    resumed = generate(model, [following], past_key_values=cache, **options)
    assert resumed.sequences.tolist() == generate(model, [following], **options).sequences.tolist()
