"""A random search for files that bring the command line down. Whatever a checkpoint's files hold, `dllm-hf` either works
or ends with 2 and one line that names the file or the argument: no traceback, no hanging, nothing left behind.

A case is a seed: `pytest tests/fuzz/test_malicious_files.py -k "[17]"` repeats one, `DLLM_HF_FUZZ=10000` tries more.
"""

import functools
import importlib
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dllm_hf_cli import main

from ..builders import BUILDERS, character_tokenizer, new_model
from ..cli.conftest import CHAT_TEMPLATE

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("DLLM_HF_FUZZ", "200"))
SECONDS = 20  # for what takes a tenth of one
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX]
# Values of every type, the ends of what numbers can be, names of other files, what a template or a terminal would obey.
STRANGE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    10**9,
    10**30,
]
STRANGE += [
    "",
    "x",
    "\0",
    "\x1b[2J",
    "\u202e",
    "../../etc/hostname",
    "/dev/zero",
    "{{ 1 // 0 }}",
    "org/name--a.B",
    "x" * 9999,
]
STRANGE += [
    [],
    [1],
    ["x"],
    [[]],
    [None],
    [-1, 10**20],
    {},
    {"x": 1},
    {"rope_type": "x"},
    {"": {"": {}}},
    {"__type": "x"},
]


class TooLong(BaseException):
    """Not an `Exception`, which would be taken for a file's fault."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A small checkpoint of each family, in one file and in shards."""
    top = tmp_path_factory.mktemp("checkpoints")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for family in BUILDERS:
        for name, size in ((family, "1GB"), (f"{family}-sharded", "20KB")):
            new_model(family).save_pretrained(top / name, max_shard_size=size)
            tokenizer.save_pretrained(top / name)
            (top / name / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return sorted(top.iterdir())


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """No network, no waiting, and the code of a family is put together once."""

    def connect(*args):
        raise TooLong("a connection was made")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("dllm_hf_cli.chat.TEMPLATE_SECONDS", 0.5)
    exporting = importlib.import_module("dllm_hf.hub.export")
    monkeypatch.setattr(exporting, "bundle", bundled)


@functools.cache
def bundled(*classes):
    from dllm_hf.hub import bundle

    return bundle(*classes)


def strange(draw: random.Random):
    """A copy of one of them."""
    return json.loads(json.dumps(draw.choice(STRANGE)))


def files(folder: Path, *patterns: str) -> list[Path]:
    """What an earlier change has left a file."""
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


# What is done to a checkpoint


def change_json(folder: Path, draw: random.Random):
    """One value, somewhere in a file."""
    path = draw.choice(files(folder, *JSON))
    document = json.loads(path.read_text())
    place = document
    while True:
        if not isinstance(place, (dict, list)) or not place:
            return
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
            place = place[key]
            continue
        break
    kind = draw.randrange(4)
    if kind == 0 or isinstance(place, list):
        place[key] = strange(draw)
    elif kind == 1:
        del place[key]
    elif kind == 2:
        place[draw.choice(["x", key + "_", key.upper(), "max_time"])] = place.pop(key)
    else:
        place[draw.choice(SETTINGS)] = strange(draw)
    path.write_text(json.dumps(document))


SETTINGS = ["is_causal", "rms_norm_eps", "rope_theta", "rope_scaling", "quantization_config", "auto_map", "torch_dtype"]
SETTINGS += [
    "num_hidden_layers",
    "n_layers",
    "layer_types",
    "architectures",
    "tie_word_embeddings",
    "attn_implementation",
]
SETTINGS += ["tokenizer_class", "chat_template", "added_tokens_decoder", "extra_special_tokens", "model_max_length"]
SETTINGS += ["num_return_sequences", "max_new_tokens", "remasking_strategy", "cache_policy", "steps", "suppress_tokens"]


def replace_json(folder: Path, draw: random.Random):
    path = folder / draw.choice(JSON)
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(strange(draw)))


def damage_bytes(folder: Path, draw: random.Random):
    """Cut short, lengthened, or with other bytes somewhere."""
    path = draw.choice(files(folder, "*"))
    data = bytearray(path.read_bytes())
    kind = draw.randrange(4)
    if kind == 0:
        del data[draw.randrange(len(data) + 1) :]
    elif kind == 1:
        data += draw.randbytes(draw.randrange(1, 9))
    elif kind == 2 and data:
        for _ in range(draw.randrange(1, 9)):
            data[draw.randrange(min(len(data), 4000))] = draw.randrange(256)
    else:
        data[:0] = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 50_000, b"\0", b"<!DOCTYPE html>"])
    path.write_bytes(data)


def change_header(folder: Path, draw: random.Random):
    """The header of a weights file says something else."""
    path = draw.choice(files(folder, "*.safetensors"))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = draw.choice(list(header))
    if draw.random() < 0.3:
        header[draw.choice([name, "x"])] = strange(draw)
    elif name != "__metadata__":
        header[name][draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(
            [strange(draw), "F64", "BOOL", [10**30], [-1, 4], [0, 0], [2**62, 2**62]]
        )
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def change_weights(folder: Path, draw: random.Random):
    """Whole files with other tensors in them."""
    path = draw.choice(files(folder, "*.safetensors"))
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = draw.randrange(5)
    if kind == 0:
        tensors[name.replace("0", "7") + "x"] = tensor
    elif kind == 1:
        tensors[name] = tensor.unsqueeze(0)
    elif kind == 2:
        tensors[name] = tensor.bool() if draw.random() < 0.5 else tensor.long()
    elif kind == 3:
        tensors |= {name: tensor, f"{name}\x1b[2J": tensor.clone()}
    save_file(tensors, path, metadata={"format": "pt"})


def link(folder: Path, draw: random.Random):
    """A file is a link, or something that is no file."""
    path = folder / draw.choice(sorted(path.name for path in folder.iterdir()))
    target = draw.choice(["secret", "itself", "folder", "nowhere", "pipe", "/dev/zero", "inside"])
    whole = folder.parent / "secret"
    shutil.copyfile(path, whole) if path.is_file() else whole.write_text("{}")
    path.unlink()
    if target == "folder":
        path.mkdir()
    elif target == "pipe":
        os.mkfifo(path)
    elif target == "inside":
        whole.rename(folder / "kept")
        path.symlink_to("kept")
    else:
        path.symlink_to({"secret": "../secret", "itself": path.name}.get(target, target))


def change_card(folder: Path, draw: random.Random):
    header = {draw.choice(["license", "language", "base_model", "license_name", "x"]): strange(draw)}
    texts = [f"---\n{json.dumps(header)}\n---\n", "---\n" * 3, "---\nlicense: !!python/object:os.system\n---\n"]
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").write_text(draw.choice(texts))


CHANGES = [change_json] * 8 + [replace_json, damage_bytes, damage_bytes, change_header, change_weights, link, link]
CHANGES += [change_card]


# What must hold


@pytest.fixture
def run(capsys, monkeypatch):
    def run(*arguments):
        """`(exit code, stdout, stderr)`, within the time."""

        def stop(*_):
            raise TooLong(f"{arguments} has not ended")

        monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS)
        try:
            return main([str(argument) for argument in arguments]), *capsys.readouterr()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return run


def assert_it_works_or_says_why(result, folder: Path):
    code, stdout, stderr = result
    assert "Traceback" not in stderr and "\x1b" not in stderr
    if code == 0:
        # A conversation goes on where one question could not be answered.
        assert stdout or "the question is forgotten" in stderr
    else:
        assert (code, stdout) == (2, "") and stderr.count("\n") == 1, result
        assert stderr.startswith("dllm-hf: error: ") and str(folder) in stderr, stderr


def assert_all_is_well(run, source: Path, command: str):
    out, beside = source.parent / "out", {path.name for path in source.parent.iterdir()}
    exported = run("export", source, out)
    assert_it_works_or_says_why(exported, source)
    if exported[0] == 0:
        assert (out / "config.json").is_file() and not any(path.is_symlink() for path in out.iterdir())
        beside.add("out")
    assert {path.name for path in source.parent.iterdir()} == beside
    code, stdout, stderr = run(command, source, *arguments_of(command))
    # A warning of what nothing reads may come before.
    *warnings, last = stderr.splitlines(keepends=True)
    assert all(line.startswith("dllm-hf: warning: ") for line in warnings)
    assert_it_works_or_says_why((code, stdout, last), source)
    if exported[0] == code == 0:
        assert run(command, out, *arguments_of(command))[:2] == (code, stdout)
    return exported[0], code


def arguments_of(command: str) -> list:
    return [*(["Hi"] if command == "generate" else []), "--max-new-tokens", 2, "--seed", 1]


@pytest.mark.parametrize("seed", range(CASES))
def test_no_files_bring_it_down(run, checkpoints, tmp_path, seed):
    draw = random.Random(seed)
    source = shutil.copytree(draw.choice(checkpoints), tmp_path / "source")
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        try:
            draw.choice(CHANGES)(source, draw)
        except Exception:
            pass  # an earlier change has left nothing to change
    assert_all_is_well(run, source, draw.choice(["generate", "generate", "chat"]))


# What has been found so far


def setting(file: str, **values):
    return lambda folder: (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def linked(file: str, target: str):
    return lambda folder: ((folder / file).unlink(), (folder / file).symlink_to(target))


def piped(file: str):
    return lambda folder: ((folder / file).unlink(), os.mkfifo(folder / file))


def without(part: str, instead: str | None = None):
    def change(folder: Path):
        tensors = load_file(folder / WEIGHTS)
        for name in [name for name in tensors if part in name]:
            tensor = tensors.pop(name)
            if instead is not None:
                tensors[name.replace(part, instead)] = tensor
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# What it is: how it is made of a checkpoint, what refuses it.
FOUND = {
    "a block is missing": (without(".blocks.1."), "both"),
    "a block has another name": (without(".blocks.1.", ".block.1."), "both"),
    "no layers": (setting("config.json", n_layers=0), "both"),
    "too many layers": (setting("config.json", n_layers=10**9), "both"),
    "no width": (setting("config.json", d_model=0), "both"),
    "causal attention": (setting("config.json", is_causal=True), "both"),
    "a norm of NaN": (setting("config.json", rms_norm_eps=float("nan")), "both"),
    "positions that do not turn": (setting("config.json", rope_parameters={"rope_theta": 0}), "both"),
    "positions of another kind": (setting("config.json", rope_parameters={"rope_type": "evil"}), "both"),
    "a configuration that is a list": (text("config.json", "[]"), "both"),
    "options that are a list": (text("generation_config.json", "[]"), "both"),
    "a strategy that is a list": (setting("generation_config.json", remasking_strategy=["random"]), "both"),
    "a thousand million completions": (setting("generation_config.json", num_return_sequences=10**9), "decoding"),
    "an end that is no token": (setting("generation_config.json", eos_token_id=2**31), "decoding"),
    "a length that is a text": (setting("tokenizer_config.json", model_max_length="x"), "decoding"),
    "a template that raises": (text("chat_template.jinja", "{{ raise_exception('no') }}"), "chat"),
    "a template that never ends": (text("chat_template.jinja", ENDLESS), "chat"),
    "a link out of the folder": (linked("tokenizer_config.json", "/dev/null"), "exporting"),
    "a link to itself": (linked("config.json", "config.json"), "both"),
    "a pipe for a card": (piped("README.md"), "nothing"),
    "a pipe for a configuration": (piped("config.json"), "both"),
    "a card that runs code": (text("README.md", "---\nlicense: !!python/object:os.system\n---\n"), "nothing"),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_stays_mended(run, checkpoints, tmp_path, what):
    change, refused_by = FOUND[what]
    source = shutil.copytree(next(path for path in checkpoints if path.name == "llada"), tmp_path / "source")
    change(source)
    codes = assert_all_is_well(run, source, "chat" if refused_by == "chat" else "generate")
    assert (
        codes
        == {"both": (2, 2), "exporting": (2, 0), "decoding": (0, 2), "chat": (0, 2), "nothing": (0, 0)}[refused_by]
    )
