"""What `python -m build` makes: a source distribution of a decent size, and a wheel that works alone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatchling")
pytestmark = pytest.mark.slow  # it builds, and makes an environment: CI runs it with `make test-slow`

ROOT = Path(__file__).parents[2]

DECODE = """
import dllm_hf, torch
from importlib.metadata import version
from transformers import AutoModelForCausalLM, GenerationConfig

config = dllm_hf.LLaDAConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=32,
    mask_token_id=63, eos_token_id=62, pad_token_id=62,
)
AutoModelForCausalLM.from_config(config).save_pretrained("tiny")
model = AutoModelForCausalLM.from_pretrained("tiny").eval()
output = model.diffusion_generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, block_length=4, cache_policy="dual")
assert output.shape == (1, 11) and not (output == 63).any(), output
assert version("dllm-hf") == dllm_hf.__version__
print(dllm_hf.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that sees nothing of the checkout."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """The wheel is built from the source distribution, so that this is whole."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


def test_the_source_distribution_has_docs_and_tests_but_no_trained_weights_in_a_megabyte_beside_the_golden_cases(
    distributions,
):
    (archive,) = distributions.glob("*.tar.gz")
    golden = list((ROOT / "tests/golden").glob("*/*.safetensors"))
    assert archive.stat().st_size < sum(path.stat().st_size for path in golden) + 1_000_000
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"README.md", "LICENSE", "docs/index.md", "mkdocs.yml", "tests/test_golden.py", "Makefile"} <= names
    assert ".ci/docs_links.py" in names and "hub_configs/llada-tiny-sudoku/config.json" in names
    assert {name for name in names if name.endswith(".safetensors")} == {str(path.relative_to(ROOT)) for path in golden}


def test_the_wheel_alone_decodes_a_tiny_model(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    # The dependencies are those of this environment. Of what it has installed as editable nothing is seen: path files are
    # read in the site folders of the environment that runs.
    here = sysconfig.get_path("purelib", vars={"base": sys.prefix, "platbase": sys.prefix})
    there = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    (Path(there) / "dependencies.pth").write_text(f"{here}\n")

    with zipfile.ZipFile(wheel) as opened:  # the page of the server, which is no Python
        page = {f"dllm_hf/serving/page/{name}" for name in ("index.html", "page.css", "page.js", "icon.svg")}
        assert page <= set(opened.namelist())
    said = run(python, "-c", DECODE, cwd=tmp_path)
    assert Path(said.strip().splitlines()[-1]).is_relative_to(there)
    shown = run(tmp_path / "venv/bin/dllm-hf", "--help", cwd=tmp_path)
    assert "generate" in shown
