"""`dllm-hf chat`."""

import io

import pytest
from transformers import AutoTokenizer

from dllm_hf import LLaDAModelLM


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
