"""How the code hangs together: imports run one way, and a file is one idea."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 300
"""Lines of a file."""

FOLDERS = {"patchselect": "patchselect", "adapters": "patchselect.adapters", "benchmarks": "benchmarks"}
"""Where the code is, and what it is imported as."""


def modules() -> dict[str, Path]:
    """All modules of the project, by name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if inside[0] == "adapters" and folder == "patchselect":  # a link, where nothing is installed
                continue
            parts = [package, *(part for part in inside if part != "__init__")]
            found[".".join(parts)] = path
    return found


MODULES = modules()


def imported(name: str, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """What a module imports of this project: at its top, under TYPE_CHECKING and inside of functions, or by `nodes`."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in nodes or ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from a import b`: the module a.b where there is one, else a name of a.
            found |= {f"{source}.{n.name}" if f"{source}.{n.name}" in MODULES else source for n in node.names}
    return (found & set(MODULES)) - {name}


def knot(arrows: dict[str, set[str]]) -> set[str]:
    """Modules that import each other in circles, and those between two circles: what is left when all others go."""
    left = set(arrows)
    while True:
        ends = {name for name in left if not arrows[name] & left}
        starts = {name for name in left if not any(name in arrows[other] for other in left)}
        if not ends | starts:
            return left
        left -= ends | starts


def inside_of_functions(name: str) -> set[str]:
    """What a module imports of this project inside of functions."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = (
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    )
    return {source for function in functions for source in imported(name, ast.walk(function))}


def of(package: str) -> list[str]:
    return [name for name in MODULES if f"{name}.".startswith(f"{package}.")]


def test_circles_are_found():
    assert knot({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}
    assert knot({"a": {"b"}, "b": {"c"}, "c": set()}) == set()


def test_every_kind_of_import_is_seen():
    assert "benchmarks.common.clock" in imported("benchmarks.speed.measure")
    assert "benchmarks.speed.cases" in imported("benchmarks.speed.measure"), "relative"
    assert "benchmarks.accuracy" in imported("benchmarks.accuracy.clip.model"), "a name of a package"
    assert "benchmarks.accuracy.align" in imported("benchmarks.accuracy.__main__"), "a module of a package"


@pytest.mark.parametrize("package", ["benchmarks", "patchselect"])
def test_no_module_is_imported_in_a_circle(package):
    """Not under TYPE_CHECKING and not inside of a function either."""
    assert sorted(knot({name: imported(name) for name in of(package)})) == []


@pytest.mark.parametrize("name", MODULES)
def test_inside_of_functions_only_other_packages_are_imported(name):
    assert inside_of_functions(name) == set()


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_one_idea(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= LONGEST


LEVELS = (
    ("benchmarks.common",),
    ("benchmarks.models", "benchmarks.accuracy.world"),
    ("benchmarks.speed", "benchmarks.accuracy.albef", "benchmarks.accuracy.yours"),
    ("benchmarks.accuracy.clip", "benchmarks.accuracy.answering"),
    ("benchmarks.accuracy.leaks",),
)
"""Folders of benchmarks/, each of which may import those of the levels before its own."""


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_folders_of_benchmarks_import_downwards(level):
    for folder in LEVELS[level]:
        assert of(folder), folder
        others = [other for later in LEVELS[level:] for other in later if other != folder]
        for name in of(folder):
            assert not imported(name) & {module for other in others for module in of(other)}, name


def test_the_library_knows_no_benchmark():
    for name in of("patchselect"):
        assert not imported(name) & set(of("benchmarks")), name
