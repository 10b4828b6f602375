"""The options of the command line are those of the library."""

from importlib.metadata import version

import pytest

from dllm_hf import STRATEGIES, DiffusionGenerationConfig, __version__
from dllm_hf.generation.configuration import ALIASES, CACHE_DTYPES, CACHE_POLICIES
from dllm_hf_cli.options import GENERATION_OPTIONS

from .conftest import PYPROJECT, ROOT


def test_every_option_of_the_generation_config_is_there_and_no_other():
    assert list(GENERATION_OPTIONS) == [n for n in DiffusionGenerationConfig.DEFAULTS if n != "return_dict_in_generate"]


def test_the_originals_names_are_there():
    assert {other: name for name, (_, _, others) in GENERATION_OPTIONS.items() for other in others} == ALIASES


@pytest.mark.parametrize(
    "option, values",
    [("remasking_strategy", STRATEGIES), ("cache_policy", CACHE_POLICIES), ("cache_dtype", CACHE_DTYPES)],
)
def test_the_help_lists_every_value_of_a_choice(option, values):
    assert all(value in GENERATION_OPTIONS[option][1] for value in values)


@pytest.mark.parametrize("command", [(), ("generate",), ("chat",)])
def test_help_is_given_on_request(run, command):
    code, stdout, stderr = run(*command, "--help")
    assert (code, stderr) == (0, "") and stdout.startswith("usage: dllm-hf")


def test_the_version_is_one_number_everywhere(run):
    assert 'dynamic = ["version"]' in PYPROJECT and 'path = "src/dllm_hf/__init__.py"' in PYPROJECT
    assert version("dllm-hf") == __version__, "the installed version is another one: `pip install -e .` again"
    assert run("--version")[:2] == (0, f"dllm-hf {__version__}\n")
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


TYPOS = [
    (["genrate"], "generate"),
    (["chta"], "chat"),
    (["exprot"], "export"),
    (["--verison"], "--version"),
    (["generate", "MODEL", "--stpes", "3"], "--steps"),
    (["generate", "MODEL", "--temprature=1"], "--temperature"),
    (["generate", "MODEL", "--max_new_token", "3"], "--max-new-tokens"),
    (["generate", "MODEL", "--max-new", "3"], "--max-new-tokens"),
    (["generate", "MODEL", "--no-stram"], "--no-stream"),
    (["generate", "MODEL", "--dtype", "bfloat"], "bfloat16"),
    (["chat", "MODEL", "--trust-remote-cod"], "--trust-remote-code"),
    (["export", "SOURCE", "OUT", "--confg-only"], "--config-only"),
]


@pytest.mark.parametrize("arguments, meant", TYPOS, ids=str)
def test_a_typo_is_answered_with_what_was_meant(run, arguments, meant):
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1
    assert f"(did you mean {meant}?)" in stderr


UNLIKE = [["paint"], ["generate", "MODEL", "--watermark", "3"], ["chat", "MODEL", "--unheard-of"], ["--x"]]
UNLIKE += [["generate", "MODEL", "--dtype", "int8"], ["generate", "MODEL", "PROMPT", "more"]]


@pytest.mark.parametrize("arguments", UNLIKE, ids=str)
def test_what_is_unlike_everything_is_answered_without_a_guess(run, arguments):
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1
    assert "did you mean" not in stderr


NUMBERS = [name for name, (kind, _, _) in GENERATION_OPTIONS.items() if kind in (int, list, float)]


@pytest.mark.parametrize("name", ["seed", *NUMBERS])
@pytest.mark.parametrize("value", [10**20, 2**63 - 1, 10**9, -1])
def test_no_number_brings_it_down(run, folder, name, value):
    fill = [] if name in ("max_new_tokens", "max_length") else ["--max-new-tokens", 4]
    code, stdout, stderr = run("generate", folder, "Hi", f"--{name}={value}", *fill)
    assert code == 0 or (code, stdout) == (2, "")
    assert stderr.count("\n") == 1 and "Traceback" not in stderr
    kind = int if name == "seed" else GENERATION_OPTIONS[name][0]
    if kind is not float and value == 10**20:
        assert code == 2 and name.replace("_", "-") in stderr and "too large" in stderr
