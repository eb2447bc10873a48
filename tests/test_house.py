"""The rules of the house: which room may import which, and how long anything may be."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import mergekit_karcher
from mergekit_karcher.host import compat

PACKAGE = Path(mergekit_karcher.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Data goes one way: a room may import itself and the rooms before it.
ROOMS = [
    {"__init__", "errors", "files"},
    {"sphere", "kernels"},
    {"means"},
    {"report"},
    {"host"},
    {"align", "metrics", "runner"},
    {"compare"},
    {"cli"},
]
LONGEST_MODULE, LONGEST_FUNCTION = 350, 60


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree):
    """The modules that a file imports, anywhere in it, also by a name in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    allowed = {room}.union(*itertools.takewhile(lambda rooms: room not in rooms, ROOMS))
    for module in imports_of(tree_of(path)):
        first, *rest = module.split(".")
        if first == "mergekit_karcher":
            assert (rest[0] if rest else "__init__") in allowed
        if first == "mergekit":
            assert room == "host"
        if room == "sphere":
            assert first != "torch"
        if room in ("__init__", "errors", "files"):
            assert first in sys.stdlib_module_names | {"click", "mergekit_karcher"}


def modules_within(room):
    """Each module of a room, with those of the same room that it imports when it is imported."""
    for path in MODULES:
        if room_of(path) == room:
            name = ".".join(("mergekit_karcher", *path.relative_to(PACKAGE).with_suffix("").parts))
            body = [node for node in tree_of(path).body if isinstance(node, ast.ImportFrom)]
            modules = {node.module for node in body}
            modules |= {f"{node.module}.{alias.name}" for node in body for alias in node.names}
            yield name.removesuffix(".__init__"), modules


@pytest.mark.parametrize("room", sorted(set().union(*ROOMS)))
def test_no_room_has_a_circle_of_imports(room):
    imported = dict(modules_within(room))
    waiting = {name: modules & imported.keys() - {name} for name, modules in imported.items()}
    while waiting:
        ready = {name for name, modules in waiting.items() if not modules}
        assert ready, f"a circle among {sorted(waiting)}"
        waiting = {n: modules - ready for n, modules in waiting.items() if n not in ready}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_too_long_and_no_assert_carries_behaviour(path):
    tree = tree_of(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: -O takes asserts away"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def test_the_tests_are_not_too_long_either():
    for path in Path(__file__).parent.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 510, path.name


def test_the_range_of_mergekit_is_the_one_that_is_installed_with():
    (named,) = [r for r in requires("mergekit-karcher") if re.match(r"mergekit\b(?!-)", r)]
    assert SpecifierSet(named.removeprefix("mergekit")) == compat.SUPPORTED
