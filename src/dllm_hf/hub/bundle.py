"""The code of a remote-code repository: the modules of this package that a class needs, as one flat folder.

transformers finds the files of such a repository by searching their text for imports of the form `.name`. Therefore a
module of this package may import another one only at the top of the file, relatively and by its own name. Every other
form is refused here, with file and line; otherwise it would fail on the machine that loads the repository.
"""

import ast
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

from .. import __version__

PACKAGE = Path(__file__).parents[1]
# The text that `transformers.dynamic_module_utils.get_relative_imports` takes for an import, also inside of a string.
LOOKS_LIKE_AN_IMPORT = re.compile(r"^\s*(from\s+\.\S+\s+import|import\s+\.\S+\s*$)", re.MULTILINE)


class BundleError(ValueError):
    """A module would not work in a repository."""


def bundle(*definitions: Callable, root: Path = PACKAGE) -> dict[str, str]:
    """The files of a repository that contains `definitions`, classes and functions of this package.

    Args:
        root: the folder of the package.

    Returns:
        The text of each file, by its name.
    """
    paths = [root.joinpath(*each.__module__.split(".")[1:]).with_suffix(".py") for each in definitions]
    names: dict[str, Path] = {}
    texts: dict[str, str] = {}
    while paths:
        path = paths.pop(0)
        if path in names.values():
            continue
        name = flat_name(path, root)
        if name in names:
            raise BundleError(f"{path} and {names[name]} would both be {name}: rename one of them.")
        names[name] = path
        texts[name], imported = flattened(path, root)
        paths.extend(imported)
    return dict(sorted(texts.items()))


def flat_name(path: Path, root: Path = PACKAGE) -> str:
    """`generation/cache.py` becomes `generation_cache.py`; `sdar/modeling_sdar.py`, whose name contains its folder's
    name, becomes `modeling_sdar.py`."""
    *folders, name = path.relative_to(root).parts
    return name if all(folder in path.stem for folder in folders) else "_".join([*folders, name])


@cache  # training saves a model with its code at each checkpoint, and to read all modules takes 0.2 seconds
def flattened(path: Path, root: Path = PACKAGE) -> tuple[str, list[Path]]:
    """A module's text with its imports rewritten, and the modules of the package that it imports."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}

    def refuse(line: int, why: str) -> NoReturn:
        raise BundleError(f"{path}:{line}: {why}")

    imported: list[Path] = []
    rewritten: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            outside = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            if node not in tree.body:
                refuse(node.lineno, "a module of the package is imported at the top of a file only.")
            if node.module is None:
                refuse(node.lineno, "`from . import x` would not work: write `from .x import y`.")
            if node.level > len(path.relative_to(root).parts):
                refuse(node.lineno, f"this leads out of {root.name}.")
            target = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            if not target.is_file():
                refuse(node.lineno, f"there is no module {target.relative_to(root)}: name the module, not its folder.")
            found = re.match(r"from\s+\.+[\w.]+(?=\s+import)", lines[node.lineno - 1])
            if found is None or node.lineno in rewritten:
                refuse(node.lineno, "write `from .x import` on a line of its own.")
            flat = f"from .{flat_name(target, root).removesuffix('.py')}"
            lines[node.lineno - 1] = flat + lines[node.lineno - 1][found.end() :]
            rewritten.add(node.lineno)
            imported.append(target)
            continue
        else:
            continue
        for module in outside:
            top = module.split(".")[0]
            if top == root.name:
                refuse(node.lineno, f"`{module}` is this package, which will not be there: import it relatively.")
            if node not in tree.body and id(node) not in guarded and top not in sys.stdlib_module_names:
                refuse(node.lineno, f"`{module}` is imported inside a function: put it at the top, or into a `try`.")
    flat_text = "".join(lines)
    for found in LOOKS_LIKE_AN_IMPORT.finditer(flat_text):
        number = flat_text.count("\n", 0, found.start(1)) + 1
        if number not in rewritten:
            refuse(number, "a text line that begins like an import would be taken for one: break it elsewhere.")
    origin = path.relative_to(root.parent).as_posix()
    return f"# {origin} of dllm_hf {__version__}, Apache-2.0.\n" + flat_text, imported
