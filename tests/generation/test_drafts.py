"""Draft and verify: how many passes it saves, what its callers see, and where it is refused."""

import pytest
import torch
from transformers import LogitsProcessor, MaxLengthCriteria

from dllm_hf.generation import mixin
from dllm_hf.generation.drafts import confirmed
from dllm_hf.generation.window import Frame, make_list, make_window

from ..builders import MASK, RefusesToRun, ScriptedModel, generate, left_pad, recorded, refused, script, tiny_model
from .recorded_graphs import both_ways, fresh_model
from .test_hooks import Recorder

STATIC = {"remasking_strategy": "low_confidence_static"}


# --- passes


@pytest.mark.parametrize(
    "strategy, drafts, passes",
    [("sequential", drafts, passes) for drafts, passes in [(0, 12), (1, 7), (3, 4), (5, 3), (64, 2)]]
    + [("low_confidence_static", drafts, passes) for drafts, passes in [(1, 7), (2, 5), (4, 4), (8, 4), (9, 3)]],
)
@pytest.mark.parametrize("policy", ["none", "prefix", "dual"])
def test_a_pass_takes_as_many_steps_as_its_drafts_are_right_for(policy, strategy, drafts, passes):
    """The logits do not depend on the canvas, so that one draft of each length is. Blocks have a first pass without drafts."""
    model = ScriptedModel(script(list(range(12)), prompt=2))
    options = {"max_new_tokens": 12, "block_length": 12, "cache_policy": policy, "remasking_strategy": strategy}
    output = generate(model, [[5, 6]], draft_steps=drafts, **options)
    assert output.num_forward_passes == passes
    assert output.sequences[0, 2:].tolist() == list(range(12))
    assert output.tokens_per_forward.item() == pytest.approx(12 / passes)


def test_steps_of_several_tokens_are_drafted_as_well():
    model = ScriptedModel(script(list(range(12)), prompt=2))
    options = {"max_new_tokens": 12, "block_length": 12, "denoising_steps": 6, **STATIC}
    assert generate(model, [[5, 6]], draft_steps=2, **options).num_forward_passes == 1 + 2


def test_auto_drafts_nothing_on_a_cpu():
    model = ScriptedModel(script(list(range(8)), prompt=2))
    output = generate(model, [[5, 6]], max_new_tokens=8, block_length=8, draft_steps="auto", **STATIC)
    assert output.num_forward_passes == 8


@pytest.mark.parametrize(("policy", "width"), [("none", 20), ("prefix", 16), ("dual", 16)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_auto_fills_a_pass_up_to_what_a_gpu_has_room_for(rows, policy, width, monkeypatch):
    monkeypatch.setattr(mixin, "room_for_drafts", lambda steps, *_: (4, 128) if steps else (0, None))
    model, prompts = tiny_model("llada"), [[5, 6, 7, number] for number in range(rows)]
    options = {"max_new_tokens": 16, "block_length": 16, "cache_policy": policy, **STATIC}
    with recorded(model) as calls:
        drafted = generate(model, prompts, draft_steps="auto", **options)
    _, second, *later = (call["input_ids"] for call in calls)
    drafts = min(4, max(0, 128 // (rows * width) - 1))
    assert second.shape == (rows * (1 + drafts), width)
    assert all(each.numel() <= max(128, rows * width) for each in later)
    assert drafted.sequences.tolist() == generate(model, prompts, **options).sequences.tolist()


def test_a_draft_counts_where_the_step_before_leads_to_it():
    """Three canvases of two positions: of the first both drafts are right, of the second the other order, of the last none."""
    m, width = MASK, 3
    now = [[m, m], [m, m], [m, m]], [[m, 3], [m, 3], [m, 3]], [[4, 3], [4, m], [4, m]]
    nexts = [[m, 3], [4, m], [4, m]], [[4, 3], [4, 3], [4, 3]], [[4, 3], [4, 2], [4, 2]]
    now, nexts = (torch.tensor(rows).transpose(0, 1).reshape(3 * width, 2) for rows in (now, nexts))
    copies, level = torch.arange(9).view(3, 3), torch.tensor([0, 1, 2, 0, 1, 1, 0, 1, 0])
    moves = torch.tensor([True] * 2 + [True] + [True] * 5 + [False])
    taken = confirmed(copies, level, now, nexts, moves).tolist()
    assert taken == [[True, True, True], [True, False, True], [True, False, False]]


# --- what others see


def test_hooks_see_the_steps_of_one_at_a_time():
    found = []
    for drafts in (0, 3):
        tokens, logits = Recorder(), Recorder()
        hook = lambda step, sequences, given, note=logits: (note(step, sequences, given), given)[1]
        generate(
            tiny_model("llada"), [[5, 6, 7], [8]], max_new_tokens=8, block_length=4, cache_policy="dual",
            draft_steps=drafts, generation_tokens_hook_func=tokens, generation_logits_hook_func=hook, **STATIC,
        )  # fmt: skip
        found.append((tokens.calls, logits.calls))
    for alone, drafted in zip(*found):
        assert [step for step, *_ in drafted] == [step for step, *_ in alone]
        for (_, sequences, logits), (_, same, close) in zip(alone, drafted):
            assert same.tolist() == sequences.tolist()
            assert (logits is None) == (close is None)
            if logits is not None:
                torch.testing.assert_close(close, logits)


def test_a_hook_that_changes_tokens_is_obeyed():
    def hook(step, sequences, logits):
        if step == 2:
            sequences[:, 4] = 33
        return sequences

    options = {"max_new_tokens": 8, "block_length": 8, "generation_tokens_hook_func": hook, **STATIC}
    alone, drafted = (generate(tiny_model("dream"), [[5, 6]], draft_steps=number, **options) for number in (0, 3))
    assert drafted.sequences.tolist() == alone.sequences.tolist()
    assert drafted.sequences[0, 4] == 33


def test_processors_and_criteria_are_asked_as_often():
    class Counting(LogitsProcessor):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores):
            self.seen.append(input_ids[0].tolist())
            return scores

    passes, seen = [], []
    for drafts in (0, 4):
        counting = Counting()
        output = generate(
            ScriptedModel(script(list(range(8)), prompt=2)), [[5, 6]], max_new_tokens=8, block_length=4,
            logits_processor=[counting], repetition_penalty=1.5, stopping_criteria=[MaxLengthCriteria(6)],
            draft_steps=drafts, **STATIC,
        )  # fmt: skip
        passes.append(output.num_forward_passes)
        seen.append((counting.seen, output.sequences.tolist()))
    assert seen[0] == seen[1] and passes == [4, 2]


def test_a_streamer_shows_each_step():
    class Showing:
        def __init__(self):
            self.shown = []

        def put(self, value):
            self.shown.append(value.flatten().tolist())

        put_draft = put

        def end(self):
            self.shown.append("end")

    found = []
    for drafts in (0, 4):
        streamer = Showing()
        options = {"max_new_tokens": 8, "block_length": 4, "streamer": streamer, **STATIC}
        generate(ScriptedModel(script(list(range(8)), prompt=2)), [[5, 6]], draft_steps=drafts, **options)
        found.append(streamer.shown)
    assert found[0] == found[1] and len(found[0]) > 8


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family, policy",
    [
        ("dream", "dual"),
        pytest.param("dream", "prefix", marks=SLOW),
        ("sdar", "block"),
        pytest.param("gla_dream", "block", marks=SLOW),
    ],
)
def test_the_fast_path_takes_drafts_too(family, policy, captured):
    """The accepted steps are chosen within the graph."""
    options = {"max_new_tokens": 12, "block_length": 4, "remasking_strategy": "sequential", "cache_policy": policy}
    model = fresh_model(family)
    plain = both_ways(model, draft_steps=2, **options)
    assert captured
    watched = both_ways(model, draft_steps=2, output_history=True, **options)
    alone = both_ways(model, **options)
    assert plain.sequences.tolist() == alone.sequences.tolist() == watched.sequences.tolist()


@pytest.mark.parametrize("first, second", [(0, 3), (3, 0), (3, 2)])
def test_a_conversation_goes_on_with_and_without_drafts(first, second):
    model, past, turns = tiny_model("sdar"), None, []
    for prompt, drafts in (([[5, 6, 7]], first), ([[5, 6, 7, 1, 2, 3, 4, 5, 9]], second)):
        options = {"max_new_tokens": 8, "remasking_strategy": "sequential"}
        output = generate(model, prompt, past_key_values=past, draft_steps=drafts, **options)
        past = output.past_key_values
        turns.append(output.sequences.tolist() == generate(model, prompt, **options).sequences.tolist())
    assert turns == [True, True]


# --- windows


def test_drafts_are_rows_that_write_to_columns_of_their_own():
    row, other = Frame(4, 8, 4, 8, 12, 12, 0, 0), Frame(0, 8, 4, 8, 8, 8, 0, 4)
    frames, slots, drafts = [other, row, row, row], [0, 1, 1, 1], [0, 0, 1, 2]
    flat, rectangle = (make(frames, slots, 3, 20, 0, drafts=drafts) for make in (make_list, make_window))
    assert flat.draft_columns == rectangle.draft_columns == 8
    assert flat.copies.tolist() == rectangle.copies.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert flat.aside.tolist() == [-1] * 12 + list(range(8))
    assert rectangle.aside[:, :4].tolist() == [[-1] * 4, [-1] * 4, [0, 1, 2, 3], [4, 5, 6, 7]]
    assert flat.texts.tolist() == [0] * 8 + [1] * 4 + [4] * 4 + [7] * 4
    assert rectangle.own.tolist() == [[0, 0, 0], [0, 0, 0], [4, 8, 0], [4, 8, 4]]
    assert sorted(zip(flat.runs[:, 1].tolist(), flat.own.tolist()))[2:] == [(12, [4, 8, 0]), (16, [4, 8, 4])]


# --- refusals


@pytest.mark.parametrize(
    "options, mention",
    [
        ({"remasking_strategy": "low_confidence_dynamic"}, "low_confidence_static"),
        ({"entropy_bound": 0.1}, "entropy_bounded.*how many"),
        ({"remasking_strategy": "random"}, "draws the positions"),
        ({**STATIC, "alg_temp": 0.5}, "alg_temp"),
        ({**STATIC, "temperature": 0.7}, "temperature=0"),
    ],
)
def test_drafts_are_refused_where_a_step_cannot_be_foreseen(options, mention):
    model = RefusesToRun(script([1, 2, 3, 4], prompt=3))
    refused(model, mention, "draft_steps", draft_steps=2, **options)


def test_drafts_are_refused_where_tokens_are_edited_and_where_steps_read_what_others_wrote():
    refused(tiny_model("llada2"), "editing_threshold", draft_steps=2, editing_threshold=0.5)
    options = {"use_block_cache": True, "cache_policy": "block", **STATIC}
    refused(tiny_model("fast_dllm_v2"), "use_block_cache", draft_steps=2, **options)


@pytest.mark.parametrize("number", [-1, 65, 1.5, True, "many"])
def test_a_wrong_number_of_drafts_is_refused(number):
    refused(
        RefusesToRun(script([1], prompt=3)),
        "`draft_steps` must be an integer from 0 to 64 or 'auto'",
        draft_steps=number,
    )


def test_rows_of_a_batch_go_on_at_their_own_pace():
    rows = [[5, 6, 7, 8], [9]]
    options = {"max_new_tokens": 8, "block_length": 4, "draft_steps": 3, **STATIC}
    together = tiny_model("llada").diffusion_generate(**left_pad(rows), **options)
    for row, prompt in zip(together, rows):
        alone = tiny_model("llada").diffusion_generate(torch.tensor([prompt]), **options)
        assert row[4 - len(prompt) :].tolist() == alone[0].tolist()
