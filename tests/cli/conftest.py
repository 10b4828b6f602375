import re
import sys
from pathlib import Path

import pytest
import torch

from dllm_hf import LLaDAModelLM
from dllm_hf_cli import main

from ..builders import character_tokenizer, llada_config

ROOT = Path(__file__).parents[2]
# What an installation makes of the declaration in pyproject.toml.
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MODULE, FUNCTION = re.search(r'^dllm-hf = "([\w.]+):(\w+)"$', PYPROJECT, re.MULTILINE).groups()
SCRIPT = f"import sys; from {MODULE} import {FUNCTION}; sys.exit({FUNCTION}())"
COMMAND = [sys.executable, "-c", SCRIPT]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save(folder, chat_template=None, tokenizer=True):
    torch.manual_seed(0)
    model = LLaDAModelLM(llada_config(max_sequence_length=4096))
    model.generation_config.max_new_tokens = 24
    # What this model prefers is no promise: it must not end the text, nor say what the tokenizer has no character for.
    model.generation_config.suppress_tokens = [59, 61, 62, 63]
    model.save_pretrained(folder)
    if tokenizer:
        tokens = character_tokenizer()
        tokens.chat_template = chat_template
        tokens.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved model with a tokenizer that has no chat template."""
    return save(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "chat", CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory):
    """A saved model without a tokenizer."""
    return save(tmp_path_factory.mktemp("models") / "bare", tokenizer=False)


@pytest.fixture
def run(capsys):
    """`run(*arguments) -> (exit code, stdout, stderr)`, in this process."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
