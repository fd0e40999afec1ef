"""What `lightning ls`, `info` and `cp` show, read from the table of methods and from source text: no class is imported for it."""

import ast
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins._support.methods import METHODS, RECIPES

PACKAGE = Path(__file__).parents[1]
CARDS = PACKAGE.parent / "docs" / "methods"


def list_all() -> str:
    """Return the two tables: recipes, and methods with their room and tier."""
    recipes = [(name, recipe.summary) for name, recipe in RECIPES.items()]
    methods = [(name, method.room, method.tier, method.summary) for name, method in METHODS.items()]
    return "\n".join(
        ["Recipes: lightning run NAME", *_table(recipes), "", "Methods: from lightning_plugins import NAME", *_table(methods)]
    )


def describe(name: str) -> str:
    """Return all there is to know of a recipe or a method: summary, options, card.

    Raises:
        InputError: if there is no such name.
    """
    if name in RECIPES:
        recipe = RECIPES[name]
        knobs = (PACKAGE / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        head = f"{name}: {recipe.summary}\n\nlightning run {name}\nlightning cp {name} FILE"
        if recipe.nproc_per_node > 1:
            head += f"\n\nIt starts {recipe.nproc_per_node} processes; --nproc-per-node N starts another number."
        return "\n\n".join([head, knobs.rstrip(), _card(recipe.card)])
    if name not in METHODS:
        raise InputError(f"there is no {name!r}; {nearest(name, [*METHODS, *RECIPES])}")
    method = METHODS[name]
    spec = find_spec(method.module)
    if spec is None or spec.origin is None:
        raise InputError(f"{name} is not part of this installation; reinstall lightning_plugins")
    options = _options(Path(spec.origin).read_text(encoding="utf-8"), name)
    head = f"{name}: {method.summary}\n{method.tier}, {method.room}; from lightning_plugins import {name}"
    return "\n".join([head, "", *_table(options), "", _card(method.card)])


def copy_recipe(name: str, file: Path) -> None:
    """Copy a recipe's YAML to ``file``, whole or not at all.

    Raises:
        InputError: if there is no such recipe, ``file`` exists, or it cannot be written.
    """
    if name not in RECIPES:
        raise InputError(f"no recipe is called {name!r}; {nearest(name, RECIPES)}")
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"the copy is called {file}, but a YAML to run must end in .yaml or .yml; name it so")
    if file.exists():
        raise InputError(f"{file} exists already and is not overwritten; choose another name, or remove it")
    try:
        with atomic_write(file, "w") as copy:
            copy.write((PACKAGE / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}); choose a folder that exists and may be written"
        ) from error


def _options(source: str, name: str) -> list[tuple[str, str, str]]:
    """Return ``(option: type, = default, docstring line)`` of each argument of the class's constructor."""
    node = next(part for part in ast.parse(source).body if isinstance(part, ast.ClassDef) and part.name == name)
    lines = _argument_lines(ast.get_docstring(node) or "")
    constructor = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if constructor is None:
        return []
    plain = constructor.args.args[1:]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(constructor.args.defaults))
    defaults += constructor.args.defaults
    rows = []
    for argument, default in zip([*plain, *constructor.args.kwonlyargs], [*defaults, *constructor.args.kw_defaults], strict=True):
        kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        rows.append((f"{argument.arg}{kind}", f"= {ast.unparse(default)}" if default else "", lines.get(argument.arg, "")))
    if further := constructor.args.kwarg:
        rows.append((f"**{further.arg}", "", lines.get(further.arg, "")))
    return rows


def _argument_lines(docstring: str) -> dict[str, str]:
    """Return the first sentence on each argument in a Google docstring's ``Args:``."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _card(card: str) -> str:
    file = CARDS / f"{card}.md"
    return f"card: docs/methods/{card}.md" + (f"\n\n{file.read_text(encoding='utf-8').rstrip()}" if file.exists() else "")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
