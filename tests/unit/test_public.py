"""The public interface: whole for type checkers, and what its signatures name is in it."""

import ast
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import zquant
from tests.unit.engine_testing import request

SOURCE = Path(zquant.__file__).read_text(encoding="utf-8")


def test_type_checkers_find_every_name_where_it_is_loaded_from() -> None:
    (block,) = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    found = {a.name: node.module for node in block.body for a in node.names}  # type: ignore[attr-defined]
    assert found == zquant._HOME
    assert {*found, "__version__"} == set(zquant.__all__)


@pytest.mark.parametrize("package", ["zquant", "zquant_kernels"])
def test_type_checkers_are_told_that_there_are_types(package: str) -> None:
    assert (files(package) / "py.typed").is_file()


def classes(hint: Any) -> Iterator[type]:
    """The classes that an annotation is made of."""
    if isinstance(hint, type):
        yield hint
    for each in get_args(hint):
        for inner in each if isinstance(each, list) else [each]:
            yield from classes(inner)


@pytest.mark.parametrize(
    "name", [name for name in vars(zquant.Engine) if name == "__init__" or name[0] != "_"]
)
def test_types_in_signatures_of_the_engine_are_public(name: str) -> None:
    method = getattr(zquant.Engine, name)
    hints = get_type_hints(getattr(method, "fget", method))
    found = {c for hint in hints.values() for c in classes(hint) if "zquant" in c.__module__}
    inner = {"Checkpoint", "Device"}  # of `__init__`, which `open` calls
    hidden = {c.__name__ for c in found} - set(zquant.__all__)
    assert hidden <= (inner if name == "__init__" else set())


def test_the_example_saves_the_recipe(toy_engine: zquant.Engine, tmp_path: Path) -> None:
    result = toy_engine.generate(request("a red fox in the snow"))
    zquant.save_png(result.images[0], tmp_path / "fox.png", result.recipes[0])
    assert zquant.read_recipe(tmp_path / "fox.png") == result.recipes[0]
    example = zquant.__doc__.split("\n\n")[1]
    used = {node.attr for node in ast.walk(ast.parse(_dedented(example))) if _of_zquant(node)}
    assert used == {"Engine", "RunRequest", "save_png"}


def _dedented(text: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in text.splitlines())


def _of_zquant(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) == "zquant"
