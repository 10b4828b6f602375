"""The options of the command line are those of the library."""

import pytest

from dllm_hf import STRATEGIES, DiffusionGenerationConfig
from dllm_hf.generation.configuration import ALIASES, CACHE_POLICIES
from dllm_hf_cli.options import GENERATION_OPTIONS


def test_every_option_of_the_generation_config_is_there_and_no_other():
    assert list(GENERATION_OPTIONS) == [n for n in DiffusionGenerationConfig.DEFAULTS if n != "return_dict_in_generate"]


def test_the_originals_names_are_there():
    assert {other: name for name, (_, _, others) in GENERATION_OPTIONS.items() for other in others} == ALIASES


@pytest.mark.parametrize("option, values", [("remasking_strategy", STRATEGIES), ("cache_policy", CACHE_POLICIES)])
def test_the_help_lists_every_value_of_a_choice(option, values):
    assert all(value in GENERATION_OPTIONS[option][1] for value in values)


@pytest.mark.parametrize("command", [(), ("generate",), ("chat",)])
def test_help_is_given_on_request(run, command):
    code, stdout, stderr = run(*command, "--help")
    assert (code, stderr) == (0, "") and stdout.startswith("usage: dllm-hf")


def test_the_version_is_given_on_request(run):
    assert run("--version")[:2] == (0, "dllm-hf 0.1.0\n")
