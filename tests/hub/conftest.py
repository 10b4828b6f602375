import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GenerationMixin

from ..builders import BUILDERS, END, MASK, VOCAB, character_tokenizer, new_model

# What the loop alone is tried with.
LOOP_ROWS = [[5, 6, 7], [8, MASK, 9, 10, 11]]
LOOP_OPTIONS = {"mask_token_id": MASK, "eos_token_id": END, "max_new_tokens": 9, "steps": 3}


class MaskedBert(BertForMaskedLM, GenerationMixin):
    """A masked model of the library with the library's `generate`."""


def masked_bert() -> MaskedBert:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return MaskedBert(BertConfig(vocab_size=VOCAB, initializer_range=0.3, pad_token_id=0, **sizes)).eval()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name.endswith(".safetensors")}


def in_hub_cache(folder: Path, cache: Path, name: str) -> Path:
    """Put a folder into a cache as `huggingface_hub` would have downloaded it."""
    place = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    snapshot = place / "snapshots" / commit
    for made in (place / "refs", place / "blobs", snapshot):
        made.mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for path in (path for path in folder.iterdir() if path.is_file()):
        blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


class Fresh:
    """A process without dllm_hf: tasks of `fresh.py` are noted with `ask`, done by `run`, and read with `answer`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tasks, self.answers = {}, None
        folder.mkdir()

    def ask(self, key, task: str, **arguments):
        self.tasks[key] = (task, {name: str(v) if isinstance(v, Path) else v for name, v in arguments.items()})

    def run(self, **settings):
        (self.folder / "tasks.json").write_text(json.dumps(list(self.tasks.values())))
        empty = self.folder / "elsewhere"
        empty.mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HOME": str(self.folder / "home"), "HF_MODULES_CACHE": str(self.folder / "modules")}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "fresh.py"), str(self.folder / "tasks.json")],
            cwd=empty,
            env={**environment, **{name: str(value) for name, value in settings.items()}},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        self.answers = dict(zip(self.tasks, json.loads(done.stdout)))
        return self

    def answer(self, key):
        answer = self.answers[key]
        assert "error" not in answer, answer.get("error", "")[-1500:]
        return answer["gave"]


@pytest.fixture(scope="module")
def fresh_processes(tmp_path_factory):
    """`fresh_processes() -> Fresh`"""
    return lambda: Fresh(tmp_path_factory.mktemp("fresh") / "process")


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A small checkpoint of each family, and one in shards. They are not to be changed."""
    top = tmp_path_factory.mktemp("sources")
    for family in BUILDERS:
        new_model(family).save_pretrained(top / family)
        character_tokenizer().save_pretrained(top / family)
    new_model("llada").save_pretrained(top / "sharded", max_shard_size="20KB")
    return top


@pytest.fixture
def source(sources, tmp_path):
    return shutil.copytree(sources / "llada", tmp_path / "source")


@pytest.fixture
def sharded(sources, tmp_path):
    return shutil.copytree(sources / "sharded", tmp_path / "source")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub's cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"
