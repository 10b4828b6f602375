"""`dllm-hf chat`."""

import io
import shutil

import pytest
from transformers import AutoTokenizer

from dllm_hf import LLaDAModelLM

from .conftest import CHAT_TEMPLATE


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the model is given, as token ids. `prompts.fail` is raised by the next generation."""

    class Prompts(list):
        fail = None

    seen, generate = Prompts(), LLaDAModelLM.diffusion_generate

    def diffusion_generate(self, inputs, **kwargs):
        seen.append(inputs[0].tolist())
        if seen.fail is not None:
            failure, seen.fail = seen.fail, None
            raise failure
        return generate(self, inputs, **kwargs)

    monkeypatch.setattr(LLaDAModelLM, "diffusion_generate", diffusion_generate)
    return seen


@pytest.fixture
def say(run, chat_folder, monkeypatch):
    def say(*lines, options=("--max-new-tokens", "6")):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return run("chat", chat_folder, *options)

    return say


def decoded(prompts, chat_folder):
    return [AutoTokenizer.from_pretrained(chat_folder).decode(prompt) for prompt in prompts]


def test_the_conversation_is_kept_and_the_answers_are_printed(say, prompts, chat_folder):
    code, stdout, stderr = say("Hi", "And", "/exit", "never read")
    assert code == 0 and stderr.count("forward passes") == 2
    first, second = decoded(prompts, chat_folder)
    assert first == "user:Hi\nassistant:"
    assert second.startswith(first) and second.endswith("\nuser:And\nassistant:")
    answer = second.removeprefix(first).removesuffix("\nuser:And\nassistant:")
    assert len(answer) == 6 and stdout.startswith(answer + "\n")


def test_clear_forgets_the_conversation(say, prompts, chat_folder):
    say("Hi", "/clear", "And")
    assert decoded(prompts, chat_folder)[1] == "user:And\nassistant:"


def test_the_end_of_input_quits(say):
    assert say("Hi")[0] == say()[0] == 0


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on_without_it(say, prompts, chat_folder):
    prompts.fail = KeyboardInterrupt()
    code, _, stderr = say("Hi", "And")
    assert code == 0 and "stopped" in stderr
    assert decoded(prompts, chat_folder)[1] == "user:And\nassistant:"


def test_ctrl_c_at_the_prompt_quits(run, chat_folder, monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    code, stdout, stderr = run("chat", chat_folder)
    assert code == 130 and "Traceback" not in stderr


def test_a_conversation_too_long_for_the_model_can_be_cleared(say, prompts, chat_folder):
    code, _, stderr = say("a" * 4090, "/clear", "Hi")
    assert code == 0 and "longer than the 4096 positions" in stderr and "/clear" in stderr
    assert decoded(prompts, chat_folder)[1] == "user:Hi\nassistant:"


def test_without_a_chat_template_it_says_what_to_do(run, folder):
    code, stdout, stderr = run("chat", folder)
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1
    assert "no chat template" in stderr and "dllm-hf generate" in stderr


@pytest.mark.parametrize("command", ["/quit", "/exit"])
def test_it_can_be_quit(say, prompts, command):
    assert say("Hi", command, "never read")[0] == 0 and len(prompts) == 1


def test_help_lists_the_commands_and_asks_the_model_nothing(say, prompts):
    code, stdout, stderr = say("/help")
    assert (code, stdout, prompts) == (0, "", [])
    assert all(command in stderr for command in ("/clear", "/help", "/quit", "/exit", "Ctrl-C"))


@pytest.mark.parametrize("line, meant", [("/claer", "/clear"), ("/hlep", "/help"), ("/q", None), ("/usr/bin", None)])
def test_an_unknown_command_says_so_and_asks_the_model_nothing(say, prompts, line, meant):
    code, stdout, stderr = say(line)
    assert (code, stdout, prompts) == (0, "", [])
    assert f"{line} is no command" in stderr and "/help" in stderr
    assert (f"did you mean {meant}?" in stderr) if meant else ("did you mean" not in stderr)


def test_a_message_may_begin_with_a_blank_and_a_slash(say, prompts, chat_folder):
    say(" /quit", "/quit")
    assert decoded(prompts, chat_folder) == ["user:<unk>quit\nassistant:"]  # there is no token for a slash


def test_a_message_that_holds_the_mask_is_not_sent_and_says_why(say, prompts, chat_folder):
    code, stdout, stderr = say("a <mask><mask> b", "Hi")
    assert code == 0 and stdout.count("\n") == 1
    assert "the conversation holds the mask, '<mask>'" in stderr and "dllm-hf generate" in stderr
    assert decoded(prompts, chat_folder) == ["user:Hi\nassistant:"]


def test_a_template_that_fails_on_a_message_forgets_it_and_goes_on(run, chat_folder, prompts, monkeypatch, tmp_path):
    copy = shutil.copytree(chat_folder, tmp_path / "model")
    fails = "{% if 'bad' in messages[-1].content %}{{ raise_exception('not this') }}{% endif %}" + CHAT_TEMPLATE
    (copy / "chat_template.jinja").write_text(fails)
    monkeypatch.setattr("sys.stdin", io.StringIO("a bad one\nHi\n"))
    code, _, stderr = run("chat", copy, "--max-new-tokens", 4)
    assert code == 0 and "chat_template.jinja fails: not this" in stderr and "Traceback" not in stderr
    assert decoded(prompts, chat_folder) == ["user:Hi\nassistant:"]


def test_the_history_of_an_answer_goes_to_stderr(say):
    code, stdout, stderr = say("Hi", options=("--output-history", "--max-new-tokens", "6", "--steps", "3"))
    *history, report = stderr.splitlines()
    assert code == 0 and len(stdout) == 6 + 1 and "forward passes" in report
    assert [line.count("<mask>") for line in history] == [4, 2, 0]
