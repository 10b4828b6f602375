"""Makes links in the reference of what docstrings name as transformers does: [`Name`], [`~package.Name`]."""

import re
from pathlib import Path

import griffe

REFERENCE = Path(__file__).parents[1] / "docs/reference"


def listed() -> list[str]:
    """The full names of what the pages of the reference list, members included."""
    names = []
    for page in REFERENCE.glob("*.md"):
        entries = r"^::: ([\w.]+)(?:\n +options:\n +members: \[(.*)\])?"
        for name, members in re.findall(entries, page.read_text(encoding="utf-8"), re.MULTILINE):
            names += [name, *(f"{name}.{member}" for member in re.findall(r"\w+", members))]
    return names


class Links(griffe.Extension):
    def __init__(self):
        super().__init__()
        self.names = listed()

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\]", self.link, obj.docstring.value)

    def link(self, found: re.Match) -> str:
        shown = f"`{found[1].rpartition('.')[2]}`"
        meant = [name for name in self.names if f".{name}".endswith(f".{found[1]}")]
        return f"[{shown}][{meant[0]}]" if meant else shown
