"""`examples/cpp`: the program without Python gives the tokens of the model that its file comes from."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .comparing import CELLS

pytest.importorskip("executorch.exir", reason='needs ExecuTorch: pip install "dllm-hf[edge]"')

pytestmark = pytest.mark.slow  # exports and a build


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    """`examples/cpp/decode` as a function: file, prompt and options -> its process."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("needs CMake and a C++ compiler")
    import executorch

    sdk, build = list(executorch.__path__)[0], tmp_path_factory.mktemp("cpp")
    source = Path(__file__).parents[2] / "examples" / "cpp"
    for command in (["-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={sdk}"], ["--build", build]):
        subprocess.run(["cmake", *command], check=True, capture_output=True)

    def run(file, prompt, *options) -> subprocess.CompletedProcess:
        command = [build / "decode", file, *map(str, options)]
        return subprocess.run(command, input=" ".join(map(str, prompt)), capture_output=True, text=True)

    return run


@pytest.mark.parametrize("family, policy", CELLS[::-1])  # while another process exports the first families
def test_the_program_in_cpp_gives_the_tokens_of_python(both, exported, decode, family, policy):
    file, model = exported(family)[1] / "model.pte", both(family)[1]
    static, dynamic = "low_confidence_static", "low_confidence_dynamic"
    for length, new, options, arguments in (
        (5, 7, {"remasking_strategy": static}, []),
        (8, 9, {"remasking_strategy": static, "denoising_steps": 3}, ["--steps", 3]),
        (1, 12, {"remasking_strategy": dynamic, "confidence_threshold": 0.02}, ["--threshold", 0.02]),
    ):
        prompt = torch.randint(0, 200, (1, length), generator=torch.Generator().manual_seed(length))
        options = {"max_new_tokens": new, "block_length": 4, "temperature": 0.0, "cache_policy": policy, **options}
        expected = model.diffusion_generate(prompt, eos_token_id=[], **options)[0, length:].tolist()
        arguments += ["--new", new, "--block", 4, "--policy", policy]
        got = decode(file, prompt[0].tolist(), *arguments)
        assert list(map(int, got.stdout.split())) == expected, got.stderr
        end = expected[new // 2]
        got = decode(file, prompt[0].tolist(), *arguments, "--eos", end)
        assert list(map(int, got.stdout.split())) == expected[: expected.index(end) + 1]


def test_the_program_in_cpp_links_neither_pytorch_nor_python(exported, decode):
    linked = subprocess.run(
        ["ldd", decode(exported("llada")[1] / "model.pte", [1]).args[0]], capture_output=True, text=True
    )
    assert "libexecutorch" in linked.stdout and "libtorch" not in linked.stdout and "libpython" not in linked.stdout


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([1], ["--new", 50], "a canvas of 51 columns does not fit into the 40"),
        ([1], ["--block", 5], "--block 5 is longer than the 4"),
        ([1], ["--policy", "block"], "--policy block is not one that this model has"),
        ([1], ["--new", "x"], "--new must be a number of at least 1, but is 'x'"),
        ([1], ["--threshold", 2], "--threshold must be a probability"),
        ([1], ["--tpyo", 1], "unknown option --tpyo"),
        ([999], [], "the prompt's id 999 is not in the vocabulary of 320"),
        (["a"], [], "the prompt must be token ids"),
    ],
)
def test_the_program_in_cpp_refuses_what_it_cannot_do(exported, decode, prompt, options, message):
    got = decode(exported("llada")[1] / "model.pte", prompt, *options)
    assert got.returncode == 2 and not got.stdout and message in got.stderr


def test_the_program_in_cpp_refuses_a_truncated_file_and_a_missing_delegate_before_the_first_pass(
    exported, tmp_path, decode
):
    whole = (exported("llada")[1] / "model.pte").read_bytes()
    for name, contents, message in (
        ("short.pte", whole[:-5000], "the file cannot be read"),
        ("other.pte", whole.replace(b"XnnpackBackend", b"UnknownBackend"), "prefill cannot be loaded.*a delegate"),
    ):
        (tmp_path / name).write_bytes(contents)
        got = decode(tmp_path / name, [1], "--new", 4)
        assert got.returncode == 2 and not got.stdout and re.search(message, got.stderr), got.stderr
