"""`dllm-hf generate`."""

import ast
import io
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..builders import CHARACTERS

REPORT = re.compile(r"(\d+) tokens, (\d+) forward passes, ([\d.]+) tokens per forward, [\d.]+ s\n$")


def reported(stderr):
    tokens, passes, rate = REPORT.search(stderr).groups()
    return int(tokens), int(passes), float(rate)


def test_prints_what_diffusion_generate_returns_and_nothing_else(run, folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = model.diffusion_generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=10)
    assert run("generate", folder, "Hello", "--max-new-tokens", 10)[:2] == (0, tokenizer.decode(tokens[0]) + "\n")


def test_reports_tokens_forward_passes_and_their_ratio_on_stderr(run, folder):
    _, _, stderr = run("generate", folder, "Hello", "--max-new-tokens", 12, "--steps", 4)
    assert reported(stderr) == (12, 4, 3.0)


def test_counts_tokens_up_to_the_end_of_sequence(run, folder):
    _, stdout, _ = run("generate", folder, "Hello")
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(stdout[5])
    _, _, stderr = run("generate", folder, "Hello", "--eos-token-id", end)
    assert reported(stderr)[0] == 1


def test_no_prompt_starts_from_nothing(run, folder):
    code, stdout, _ = run("generate", folder, "--max-new-tokens", 7)
    assert code == 0 and len(stdout) == 8


def test_a_hyphen_reads_the_prompt_from_standard_input(run, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert (
        run("generate", folder, "-", "--max-new-tokens", 5)[1]
        == run("generate", folder, "Hello", "--max-new-tokens", 5)[1]
    )


def test_masks_in_the_prompt_are_filled(run, folder):
    code, stdout, stderr = run("generate", folder, "ab<mask><mask>cd", "--max-new-tokens", 0)
    assert code == 0 and re.fullmatch(r"(?s)ab..cd\n", stdout)
    assert reported(stderr)[0] == 2


@pytest.mark.parametrize("arguments", [("Hi", "--max-new-tokens", "5"), ("--max-new-tokens", "5", "Hi")])
def test_options_stand_before_or_after_the_prompt(run, folder, arguments):
    code, stdout, _ = run("generate", folder, *arguments)
    assert code == 0 and len(stdout) == len("Hi") + 5 + 1


@pytest.mark.parametrize("spelling", ["--max-new-tokens", "--max_new_tokens", "--gen_length", "--max-tokens"])
def test_underscores_and_the_originals_names_are_understood(run, folder, spelling):
    assert len(run("generate", folder, "Hi", spelling, 3)[1]) == len("Hi") + 3 + 1


def test_the_same_seed_draws_the_same_text_and_no_seed_another_one_each_time(run, folder):
    def sample(*seed):
        return run("generate", folder, "Hi", "--temperature", 1.5, *seed)[1]

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    assert sample() != sample()


def test_several_tokens_can_be_suppressed(run, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, stdout, _ = run("generate", folder, "Hi", "--max-new-tokens", 8)
    common = tokenizer(stdout[2:-1])["input_ids"]
    code, other, _ = run("generate", folder, "Hi", "--max-new-tokens", 8, "--suppress-tokens", *common, 59, 61, 62, 63)
    assert code == 0 and not set(common) & set(tokenizer(other[2:-1])["input_ids"])


def test_several_completions_are_set_apart_by_an_empty_line(run, folder):
    line_break = AutoTokenizer.from_pretrained(folder)("\n")["input_ids"]
    options = ("--num-return-sequences", 2, "--max-new-tokens", 4, "--suppress-tokens", *line_break, 59, 61, 62, 63)
    _, stdout, stderr = run("generate", folder, "Hi", *options)
    assert re.fullmatch(r"Hi.{4}\n\nHi.{4}\n", stdout)
    assert reported(stderr)[0] == 8


def test_the_history_goes_to_stderr_one_line_for_each_step(run, folder):
    _, stdout, stderr = run("generate", folder, "Hi", "--output-history", "--max-new-tokens", 6, "--steps", 3)
    *history, last, _ = stderr.splitlines()
    assert [line.count("<mask>") for line in [*history, last]] == [4, 2, 0]
    assert ast.literal_eval(last) == stdout[:-1]


def test_drafts_are_seen_on_a_terminal_and_only_there(run, folder, monkeypatch):
    piped = run("generate", folder, "Hi", "--max-new-tokens", 6)[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\033[33m" in run("generate", folder, "Hi", "--max-new-tokens", 6)[1]
    assert run("generate", folder, "Hi", "--max-new-tokens", 6, "--no-stream")[1] == piped
    monkeypatch.setenv("TERM", "dumb")
    assert run("generate", folder, "Hi", "--max-new-tokens", 6)[1] == piped


def one_line_error(result, *words):
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    assert stderr.count("\n") == 1 and stderr.startswith("dllm-hf")
    assert all(word in stderr for word in words), stderr


def test_mistakes_are_one_line_on_stderr_with_exit_code_2(run, folder, bare_folder, tmp_path):
    one_line_error(
        run("generate", folder, "Hi", "--steps", 2, "--denoising-steps", 2), "`steps=2`", "`denoising_steps=2`"
    )
    one_line_error(
        run("generate", folder, "Hi", "--remasking-strategy", "lowconfidence"), "`remasking_strategy", "did you mean"
    )
    two_names = ["--gen-length", 5, "--max_new_tokens", 9]
    one_line_error(run("generate", folder, "Hi", *two_names), "--gen-length 5", "--max-new-tokens 9", "only one")
    one_line_error(run("generate", folder, "--max-new-tokens", 0), "`max_new_tokens=0`")
    one_line_error(run("generate", folder, "Hi", "--steps", "many"), "--steps", "many")
    one_line_error(run("generate", folder, "Hi", "--unheard-of", 1), "--unheard-of")
    one_line_error(run("generate", folder, "Hi", "--device", "warp"), "--device warp")
    one_line_error(run("generate", bare_folder, "Hi"), "no tokenizer")
    one_line_error(run("generate", tmp_path / "nowhere", "Hi"), "nowhere")
    one_line_error(run("generate", tmp_path, "Hi"), "config.json")
    one_line_error(run("generate"), "MODEL")
    one_line_error(run("paint"), "generate", "chat")


def test_an_option_may_come_again_and_by_another_name_with_the_same_value(run, folder):
    expected = run("generate", folder, "Hi", "--max-new-tokens", 5)[1]
    for options in (["--max-new-tokens", 9, "--max-new-tokens", 5], ["--gen-length", 5, "--max-new-tokens", 5]):
        assert run("generate", folder, "Hi", *options)[:2] == (0, expected)


def test_a_model_that_is_neither_here_nor_on_the_hub_is_a_mistake_too(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one_line_error(run("generate", "nobody/nothing", "Hi"), "no folder nobody/nothing")


def test_the_text_ends_behind_a_stop_string(run, folder):
    text = run("generate", folder, "Hi")[1].rstrip("\n")
    stop = text[6:8]
    stopped = run("generate", folder, "Hi", "--stop-strings", stop, "never there")[1].rstrip("\n")
    assert stopped == text[: text.index(stop, 2) + 2]


def test_words_that_are_not_wanted_are_not_written(run, folder):
    token = CHARACTERS.index(run("generate", folder, "Hi")[1][2])
    assert CHARACTERS[token] not in run("generate", folder, "Hi", "--bad-words-ids", str(token))[1][2:]
