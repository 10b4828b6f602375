"""Drafts in the engine: as long as few completions run, and for those whose steps can be foreseen."""

import pytest

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import engine

from ..builders import ScriptedModel, script

LENGTH = 8


def passes_of(number: int, draft_steps=None, **options) -> list[int]:
    """The passes of so many completions of 8 tokens, whose logits do not depend on the canvas."""
    model = ScriptedModel(script(list(range(LENGTH)), prompt=2))
    llm = LLM(model, max_num_seqs=32, block_length=LENGTH, draft_steps=draft_steps)
    options = {"remasking_strategy": "sequential", **options}
    outputs = llm.generate([[5, 6]] * number, SamplingParams(max_tokens=LENGTH, **options), use_tqdm=False)
    assert all(output.outputs[0].token_ids == list(range(LENGTH)) for output in outputs)
    return [output.outputs[0].num_forward_passes for output in outputs]


def test_one_completion_takes_several_steps_in_a_pass():
    assert passes_of(1) == [8]
    assert passes_of(1, draft_steps=3) == [1 + 2]


@pytest.mark.parametrize("number, passes", [(4, 1 + 3), (7, 8)])
def test_drafts_give_way_to_completions(number, passes):
    """In a pass of 128 tokens four canvases of 10 columns leave room for two drafts each, and seven for none."""
    assert passes_of(number, draft_steps=3) == [passes] * number


def test_auto_is_none_on_a_cpu_and_on_a_gpu_what_it_has_room_for(monkeypatch):
    assert passes_of(1, draft_steps="auto") == [8]
    # A canvas of 10 columns is one step's, before the tokens that it leads to.
    for tokens, same_as in ((50, 4), (30, 2), (10, 0)):
        monkeypatch.setattr(engine, "room_for_drafts", lambda *_, tokens=tokens: (4, tokens))
        found = passes_of(1, draft_steps="auto")
        monkeypatch.undo()
        assert found == passes_of(1, draft_steps=same_as)


@pytest.mark.parametrize(
    "options",
    [
        {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 1.0},
        {"remasking_strategy": "random", "seed": 0},
        {"options": {"alg_temp": 0.5}, "seed": 0},
        {"temperature": 0.01, "seed": 0},
    ],
)
def test_what_cannot_be_foreseen_takes_one_step_a_pass(options):
    assert passes_of(1, draft_steps=3, **options) == [8]


def test_the_model_s_generation_config_says_it_too():
    model = ScriptedModel(script(list(range(LENGTH)), prompt=2))
    model.generation_config = model.generation_config.updated(draft_steps=3)
    llm = LLM(model, block_length=LENGTH)
    params = SamplingParams(max_tokens=LENGTH, remasking_strategy="sequential")
    assert llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].num_forward_passes == 3


def test_a_wrong_number_of_drafts_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="`draft_steps` must be an integer from 0 to 64 or 'auto'"):
        LLM("no-such-folder", draft_steps=-1)


def test_a_request_cannot_ask_for_drafts():
    with pytest.raises(ValueError, match="`draft_steps`.*`LLM`"):
        SamplingParams(options={"draft_steps": 2})
