"""History, Dream's hooks, and the library's logits processors."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from ..builders import END, MASK, VOCAB, ScriptedModel, generate, left_pad, new_tokens, script

NUMBER = 6
OPTIONS = {"max_new_tokens": NUMBER, "block_length": 3, "remasking_strategy": "low_confidence_static"}


class Recorder:
    """A hook that notes how it was called and changes nothing."""

    def __init__(self):
        self.calls = []

    def __call__(self, step, sequences, logits):
        self.calls.append((step, sequences.clone(), logits if logits is None else logits.clone()))
        return sequences


def left_alone(step, sequences, logits):
    return sequences


# --- history


def test_the_history_has_an_entry_for_each_step_and_ends_with_the_sequences(model, policy):
    output = generate(model, [[5, 6], [7]], output_history=True, cache_policy=policy, eos_token_id=[], **OPTIONS)
    assert len(output.history) == output.num_forward_passes == NUMBER
    assert output.history[-1].tolist() == output.sequences.tolist()
    masks = [int((entry == MASK).sum()) for entry in output.history]
    assert masks == sorted(masks, reverse=True)


def test_the_history_keeps_what_padding_replaces():
    output = generate(ScriptedModel(script([1, END, 3])), [[]], max_new_tokens=3, pad_token_id=0, output_history=True)
    assert output.history[-1].tolist() == [[1, END, 3]]
    assert output.sequences.tolist() == [[1, END, 0]]


def test_the_history_is_returned_where_it_is_asked_for_only(model):
    inputs = left_pad([[5, 6]])
    assert model.diffusion_generate(**inputs, return_dict_in_generate=True, **OPTIONS).history is None
    assert model.diffusion_generate(**inputs, output_history=True, **OPTIONS).history is not None
    assert isinstance(model.diffusion_generate(**inputs, **OPTIONS), torch.Tensor)


# --- Dream's hooks


def test_the_tokens_hook_is_called_before_the_first_step_and_after_each(model):
    hook = Recorder()
    output = generate(model, [[5, 6], [7]], generation_tokens_hook_func=hook, eos_token_id=[], **OPTIONS)

    (step, sequences, logits), *calls = hook.calls
    assert (step, logits) == (None, None)
    assert (sequences[:, 2:] == MASK).all()
    assert [step for step, _, _ in calls] == list(range(NUMBER))
    assert all(logits.shape == (2, 3, VOCAB) for _, _, logits in calls)
    assert calls[-1][1].tolist() == output.sequences.tolist()


def test_a_hook_that_changes_nothing_changes_nothing(model, policy):
    hooks = {"generation_tokens_hook_func": left_alone, "generation_logits_hook_func": lambda step, x, logits: logits}
    rows = [[5, 6], [], [7, MASK, 8]]
    expected = generate(model, rows, cache_policy=policy, **OPTIONS).sequences
    assert generate(model, rows, cache_policy=policy, **hooks, **OPTIONS).sequences.tolist() == expected.tolist()


def test_a_tokens_hook_can_change_tokens():
    def shout(step, sequences, logits):
        return torch.where(sequences == 1, 50, sequences)

    model = ScriptedModel(script([1, 2, 1, 4, 1, 6]))
    assert new_tokens(model, [], generation_tokens_hook_func=shout, **OPTIONS) == [50, 2, 50, 4, 50, 6]


def test_a_tokens_hook_can_write_before_the_first_step():
    def begin(step, sequences, logits):
        if step is None:
            sequences[:, 1] = 50
        return sequences

    model = ScriptedModel(script([1, 2, 3, 4, 5, 6]))
    output = generate(model, [[]], generation_tokens_hook_func=begin, **OPTIONS)
    assert output.sequences.tolist() == [[1, 50, 3, 4, 5, 6]]
    assert output.num_forward_passes == 5


def masks_again(when, column):
    """A hook that masks a column after the steps for which `when` holds, once each."""

    def hook(step, sequences, logits):
        if when(step):
            sequences[:, column] = MASK
        return sequences

    return hook


@pytest.mark.parametrize(
    "strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential", "maskgit_plus", "origin"]
)
@pytest.mark.parametrize(
    "when, column",
    [
        (lambda step: step == 1, 2),
        (lambda step: step == 2, 2),
        (lambda step: step == NUMBER - 1, NUMBER + 1),
        (lambda step: step is not None, 3),
        (lambda step: step is None, 0),
        (lambda step: step == 4, 3),
    ],
    ids=[
        "in the block",
        "in the block's last step",
        "in the last step",
        "at every step",
        "in the prompt",
        "in a past block",
    ],
)
def test_no_mask_is_left_where_a_hook_masks_again(policy, strategy, when, column):
    """The prompt has two tokens; blocks are columns 2 to 4 and 5 to 7."""
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6, 7, 8]))
    options = {**OPTIONS, "remasking_strategy": strategy, "cache_policy": policy}
    options["generator"] = torch.Generator().manual_seed(0)
    sequences = generate(model, [[1, 2]], generation_tokens_hook_func=masks_again(when, column), **options).sequences
    assert MASK not in sequences


def test_the_history_ends_with_the_sequences_also_where_a_hook_masks_again():
    hook = masks_again(lambda step: step == NUMBER - 1, NUMBER - 1)
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6]))
    output = generate(model, [[]], generation_tokens_hook_func=hook, output_history=True, **OPTIONS)
    assert output.history[-1].tolist() == output.sequences.tolist()


def test_the_logits_hook_sees_the_blocks_logits_and_may_change_them():
    def prefer_fifty(step, sequences, logits):
        assert (sequences == MASK).any()
        assert logits.shape == (1, 3, VOCAB)
        logits[..., 50] = 100.0
        return logits

    model = ScriptedModel(script([1, 2, 3, 4, 5, 6]))
    assert new_tokens(model, [], generation_logits_hook_func=prefer_fifty, **OPTIONS) == [50] * NUMBER


@pytest.mark.parametrize("result", [None, torch.zeros(1, 2).long()], ids=["nothing", "another shape"])
def test_a_hook_that_returns_no_sequences_is_told_so(model, result):
    with pytest.raises(ValueError, match="`generation_tokens_hook_func`"):
        generate(model, [[5, 6]], generation_tokens_hook_func=lambda step, x, logits: result, **OPTIONS)


# --- logits processors


class Bans(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -torch.inf
        return scores


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logits_processor_can_ban_a_token(policy, temperature):
    model = ScriptedModel(script([1, 2] * 3, 30.0))
    # Where the token is banned any other may be drawn: none of them is to end the text.
    options = {**OPTIONS, "temperature": temperature, "cache_policy": policy, "eos_token_id": []}
    written = new_tokens(model, [], logits_processor=LogitsProcessorList([Bans(1)]), **options)
    assert 1 not in written
    assert written[1::2] == [2, 2, 2]


def test_the_librarys_processors_run():
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6], prompt=1))
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.1), NoBadWordsLogitsProcessor([[3]], eos_token_id=END)]
    )
    assert 3 not in new_tokens(model, [9], logits_processor=processors, **OPTIONS)


def test_a_plain_list_of_processors_will_do(llada):
    expected = new_tokens(llada, [5, 6], logits_processor=LogitsProcessorList([Bans(1)]), **OPTIONS)
    assert new_tokens(llada, [5, 6], logits_processor=[Bans(1)], **OPTIONS) == expected
