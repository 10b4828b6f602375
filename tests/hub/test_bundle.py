"""The bundler: what goes into a repository, what it looks like there, and what is refused before it fails elsewhere."""

import ast
import difflib
import importlib
import re
import sys
from importlib.metadata import version

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from dllm_hf.families import FAMILIES
from dllm_hf.hub.bundle import PACKAGE, BundleError, bundle, flat_name, flattened

HEADER = re.compile(r"# (dllm_hf/[\w/]+\.py) of dllm_hf (\S+), Apache-2\.0\.\n")
RELATIVE = re.compile(r"from \.+[\w.]+ import ")


@pytest.fixture
def package(tmp_path):
    """`package({path: text}) -> its folder`. Every folder in it is a package."""

    def write(files: dict[str, str]):
        root = tmp_path / "pkg"
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            (folder / "__init__.py").touch()
        return root

    return write


def class_of(module: str) -> type:
    """A class that says that it is defined in that module."""
    return type("Model", (), {"__module__": module})


def bundled(root, module: str = "pkg.main") -> dict[str, str]:
    return bundle(class_of(module), root=root)


def refusal(root, module: str = "pkg.main") -> str:
    with pytest.raises(BundleError) as refused:
        bundled(root, module)
    return str(refused.value)


# What is in it


def test_the_modules_that_are_imported_directly_or_not_are_in_it_and_no_other(package):
    files = {"main.py": "from .a import x\n", "a.py": "from .b import x\n", "b.py": "x = 1\n", "c.py": "x = 2\n"}
    assert list(bundled(package(files))) == ["a.py", "b.py", "main.py"]


def test_the_modules_of_several_classes_are_in_it_once(package):
    root = package({"main.py": "from .a import x\n", "other.py": "from .a import x\n", "a.py": "x = 1\n"})
    assert list(bundle(class_of("pkg.main"), class_of("pkg.other"), class_of("pkg.a"), root=root)) == [
        "a.py",
        "main.py",
        "other.py",
    ]


def test_modules_that_import_each_other_are_in_it_once(package):
    assert list(bundled(package({"main.py": "from .a import x\n", "a.py": "from .main import y\nx = 1\n"}))) == [
        "a.py",
        "main.py",
    ]


@pytest.mark.parametrize(
    "path, name",
    [
        ("configuration.py", "configuration.py"),
        ("generation/cache.py", "generation_cache.py"),
        ("sdar/modeling_sdar.py", "modeling_sdar.py"),
        ("sdar/modeling_sdar_moe.py", "modeling_sdar_moe.py"),
        ("a/b/c.py", "a_b_c.py"),
    ],
)
def test_a_module_is_named_after_its_folder_unless_its_name_says_it(tmp_path, path, name):
    assert flat_name(tmp_path / path, tmp_path) == name


def test_imports_name_the_files_of_the_bundle_and_every_other_line_stays(package):
    main = (
        '"""About main."""\n\n'
        "import json\n"
        "from os import path as p\n"
        "from ..generation.cache import (\n    Cache,  # one\n    Other as Another,\n)\n"
        "from ..generation.cache import Cache as C\n"
        "from .configuration_sdar import x, y  # two\n"
        "from ..top import z\n\n"
        "# from here on\nvalue = x + y + z\n"
    )
    root = package(
        {
            "sdar/modeling_sdar.py": main,
            "sdar/configuration_sdar.py": "x = y = 1\n",
            "generation/cache.py": "from ..top import z\nCache = Other = z\n",
            "top.py": "z = 5\n",
        }
    )
    files = bundled(root, "pkg.sdar.modeling_sdar")
    assert list(files) == ["configuration_sdar.py", "generation_cache.py", "modeling_sdar.py", "top.py"]
    header, text = files["modeling_sdar.py"].split("\n", 1)
    assert header == f"# pkg/sdar/modeling_sdar.py of dllm_hf {version('dllm-hf')}, Apache-2.0."
    assert text == main.replace("..generation.cache", ".generation_cache").replace("..top", ".top")


def test_the_bundle_runs_as_one_flat_package(package, tmp_path, monkeypatch):
    root = package(
        {
            "deep/er/main.py": "from ...top import (\n    one,\n    two as zwei,\n)\nfrom ..side import three\nsum = one + zwei + three\n",
            "deep/side.py": "from ..top import two\nthree = two + 1\n",
            "top.py": "one, two = 1, 2\n",
        }
    )
    flat = tmp_path / "flat_package_of_a_test"
    flat.mkdir()
    for name, text in bundled(root, "pkg.deep.er.main").items():
        (flat / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("flat_package_of_a_test.deep_er_main").sum == 6
    for name in [name for name in sys.modules if name.startswith("flat_package_of_a_test")]:
        del sys.modules[name]


def test_a_text_with_any_letter_survives(package):
    text = '"""Größe – 雪, “so”."""\n\nx = "░"  # é\n'
    assert bundled(package({"main.py": text}))["main.py"].split("\n", 1)[1] == text


# What is allowed


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    import triton\nexcept ImportError:\n    triton = None\n",
        "def f():\n    try:\n        import triton\n    except ImportError:\n        return None\n",
        "def f():\n    try:\n        from triton import language\n    except ImportError:\n        import fla\n",
        "def f():\n    import json\n    from collections import abc\n",
        "import torch\nfrom torch import nn\n",
        "# from .x import y\n",
        '"""\n>>> from .x import y\n"""\n',
        '"""It is\nfrom .5 to 1."""\n',
        "from __future__ import annotations\n",
    ],
)
def test_what_survives_is_left_as_it_is(package, text):
    root = package({"main.py": text})
    assert bundled(root) == {"main.py": flattened(root / "main.py", root)[0]}
    assert bundled(root)["main.py"].endswith(text)


# What is refused

FORMS = {
    "the module is not named": "{}from . import x\n",
    "the module above is not named": "{}from .. import x\n",
    "in a function": "{}def f():\n    from .x import y\n",
    "in a function, as a module": "{}def f():\n    from . import x\n",
    "in a class": "{}class A:\n    from .x import y\n",
    "in an if": "{}if True:\n    from .x import y\n",
    "in a try": "{}try:\n    from .x import y\nexcept ImportError:\n    y = None\n",
    "a folder": "{}from .folder import y\n",
    "a module that is not there": "{}from .nowhere import y\n",
    "outside of the package": "{}from ..outside import y\n",
    "far outside of the package": "{}from ........................outside import y\n",
    "the package by its name": "{}import pkg\n",
    "a module by its full name": "{}import pkg.x\n",
    "from a module by its full name": "{}from pkg.x import y\n",
    "by its full name in a try": "{}try:\n    from pkg.x import y\nexcept ImportError:\n    y = None\n",
    "by its full name in a function": "{}def f():\n    import pkg.x\n",
    "by its full name among others": "{}import json, pkg.x\n",
    "another package in a function": "{}def f():\n    import triton\n",
    "from another package in a function": "{}def f():\n    from triton import language\n",
    "another package in a method": "{}class A:\n    def f(self):\n        import triton\n",
    "another package in an if": "{}if True:\n    import triton\n",
    "over two lines": "{}from .x \\\n    import y\n",
    "after another statement": "{}import json; from .x import y\n",
    "before another one of its kind": "{}from .x import y; from .z import w\n",
    "with a space after the dot": "{}from . x import y\n",
    "with a space in the module": "{}from .x . y import z\n",
    "in a docstring": '{}"""About it.\n\nfrom .x import y\n"""\n',
    "in a docstring, indented": '{}def f():\n    """Use it:\n\n        from .x import y\n    """\n',
    "in a docstring, from above": '{}"""\nfrom ..x import y\n"""\n',
    "in a docstring, as a module": '{}"""\nimport .x\n"""\n',
    "in a docstring, as part of a sentence": '{}"""\nfrom .x import them all, and be happy."""\n',
    "in a docstring, over two lines": '{}"""It takes\nfrom .x\nimport y"""\n',
}


@pytest.mark.parametrize("before", ["", "'''Says\nwhat it is.'''\nimport json\n\n"], ids=["first", "later"])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_would_not_survive_is_refused_with_file_and_line(package, tmp_path, form, before):
    text = FORMS[form].format(before)
    root = package({"main.py": text, "x.py": "y = 1\n", "z.py": "w = 1\n", "folder/y.py": ""})
    (tmp_path / "outside.py").write_text("y = 1\n")
    message = refusal(root)
    found = re.match(rf"{re.escape(str(root / 'main.py'))}:(\d+): ", message)
    assert found, message
    # The line that it names is one of the form's.
    assert before.count("\n") < int(found[1]) <= text.count("\n")
    assert re.search(r"pkg|from|import|\.|\btry\b", text.splitlines()[int(found[1]) - 1])


def test_it_is_refused_in_a_module_that_is_only_imported_as_well(package):
    root = package({"main.py": "from .x import y\n", "x.py": "y = 1\n\n\ndef f():\n    from .main import z\n"})
    assert refusal(root).startswith(f"{root / 'x.py'}:5: ")


def test_two_modules_of_one_flat_name_are_refused_with_both_paths(package):
    root = package({"main.py": "from .a.b import x\nfrom .a_b import y\n", "a/b.py": "x = 1\n", "a_b.py": "y = 1\n"})
    message = refusal(root)
    assert str(root / "a" / "b.py") in message and str(root / "a_b.py") in message and "rename" in message


# The families


def own_classes(line) -> list[type]:
    return [cls for cls in line if cls.__module__.startswith("dllm_hf.")]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda line: line[0].model_type)
def line(request) -> tuple[type, ...]:
    return request.param


@pytest.fixture(scope="module")
def files(line) -> dict[str, str]:
    """The bundle of a family, as `export` makes it."""
    return bundle(*own_classes(line))


def source_of(text: str):
    return PACKAGE.parent / HEADER.match(text)[1]


def test_every_file_of_a_family_compiles(files):
    for name, text in files.items():
        compile(text, name, "exec")


def test_every_file_of_a_family_says_where_and_of_which_version_it_is(files):
    for name, text in files.items():
        found = HEADER.match(text)
        assert found and found[2] == version("dllm-hf"), name
        assert source_of(text).is_file() and flat_name(source_of(text)) == name


def test_imports_between_the_files_are_all_of_the_one_form_and_lead_to_a_file(files):
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                line = text.splitlines()[node.lineno - 1]
                assert re.match(rf"from \.{node.module} import ", line) and "." not in node.module, (name, line)
                assert f"{node.module}.py" in files, (name, line)


def test_what_the_library_takes_for_imports_are_the_imports(files, tmp_path):
    """It searches the text. What it finds besides would be asked for, and what it misses would not be there."""
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        imported = {
            node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level
        }
        assert set(get_relative_imports(tmp_path / name)) == imported


def test_they_need_no_package_but_torch_transformers_and_what_that_needs(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        needed = set(get_imports(tmp_path / name)) - sys.stdlib_module_names
        assert needed <= {"torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface_hub", "tqdm"}, (
            name
        )


def test_comments_docstrings_and_code_are_those_of_the_source(files):
    for name, text in files.items():
        ours = text.splitlines(keepends=True)[1:]
        theirs = source_of(text).read_text(encoding="utf-8").splitlines(keepends=True)
        changed = [line for line in difflib.ndiff(theirs, ours) if line[0] in "+-"]
        assert all(RELATIVE.match(line[2:]) for line in changed), (name, changed)
        assert len(ours) == len(theirs)


def test_no_file_is_there_that_the_classes_do_not_reach(line, files):
    """By the imports of the bundle itself, from the modules of the classes on."""
    reached, waiting = set(), [f"{cls.__module__.split('.')[-1]}.py" for cls in own_classes(line)]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            modules = [n for n in ast.walk(ast.parse(files[name])) if isinstance(n, ast.ImportFrom) and n.level]
            waiting += [f"{node.module}.py" for node in modules]
    assert reached == set(files)


def test_nothing_of_the_command_or_of_publishing_is_in_it(files):
    assert not [name for name in files if name.startswith(("cli", "hub", "families", "__init__"))]
