"""What `lightning run` can start: a recipe by name, a YAML by path, a user's own script by path.

A bare name is a recipe's and never a file in the working directory: a YAML can name any class and a script is code. A YAML that
says ``recipe: NAME`` on its top level (every copy that `lightning cp` makes does) is run by that recipe's script.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_plugins._support.errors import InputError, nearest, one_line
from lightning_plugins._support.methods import RECIPES
from lightning_plugins._support.namespace import NAMESPACES, VARIABLE, namespace_of
from lightning_plugins._support.optional import require
from lightning_plugins._support.run_folder import RunFolder

HERE = Path(__file__).parent
_YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Target:
    """One thing to run.

    Attributes:
        given: the recipe's name, or the whole path of the file; what ``--resume`` finds it by.
        recipe: the module of the script that runs it, or None for a plain YAML or a user's script.
        file: the YAML or the user's script, or None for a recipe started by name.
    """

    given: str
    recipe: str | None = None
    file: Path | None = None

    @property
    def is_script(self) -> bool:
        """Whether it is a user's own script."""
        return self.file is not None and self.file.suffix == ".py"

    @property
    def name(self) -> str:
        """The name of its runs' folder."""
        return self.file.stem if self.file else self.given

    @property
    def nproc_per_node(self) -> int:
        """Processes that it starts on each machine where nobody says how many: a recipe may need several."""
        name = self.recipe.rpartition(".")[2] if self.recipe else self.given
        return RECIPES[name].nproc_per_node if name in RECIPES else 1


def resumed_target(recorded: str, saved: Path) -> tuple[Target, bool]:
    """Return what a run goes on with, and whether that holds the run's options already.

    A YAML may have been edited, or removed, since: a run of one goes on from the configuration that it saved itself.

    Args:
        recorded: the target as the run folder recorded it.
        saved: where the run saves its whole configuration as soon as it trains.

    Raises:
        InputError: as `find_target` does.
    """
    if Path(recorded).suffix not in _YAML_SUFFIXES or not saved.is_file():
        return find_target(recorded), False
    recipe = read_yaml(saved).get("recipe")
    return Target(recorded, recipe=_recipe(recipe).recipe if recipe else None, file=saved), True


def find_target(word: str) -> Target:
    """Return what ``word`` names.

    Raises:
        InputError: if it is neither a recipe nor an existing file, or a YAML that cannot be read.
    """
    path = Path(word)
    if path.suffix not in (".py", *_YAML_SUFFIXES):
        if word in RECIPES:
            return _recipe(word)
        raise InputError(
            f"no recipe is called {word!r}, and a file is given with its ending, .yaml, .yml or .py; {nearest(word, RECIPES)}"
        )
    if not path.is_file():
        raise InputError(f"there is no file {word}; give the path of an existing .yaml, .yml or .py, or a recipe's name")
    path = path.resolve()
    if path.suffix == ".py":
        return Target(str(path), file=path)
    recipe = read_yaml(path).get("recipe")
    if recipe is None:
        return Target(str(path), file=path)
    if recipe not in RECIPES:
        raise InputError(f"{word} says recipe: {recipe}, which is no recipe; {nearest(str(recipe), RECIPES)}")
    return Target(str(path), recipe=_recipe(recipe).recipe, file=path)


def shipped_yaml(name: str) -> Path:
    """Return the path of a recipe's own YAML of knobs."""
    return HERE / f"{name}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML with the safe loader.

    Raises:
        InputError: if it cannot be read, is no YAML, or is no mapping.
    """
    yaml = require("yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({one_line(str(error))}); give a YAML in UTF-8 that you may read") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML: {one_line(str(error))}; correct it there") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no mapping; a YAML to run has the keys model, data and trainer")
    return content


def choose_yaml_namespace(path: Path, options: list[str], home: Path | None = None) -> None:
    """Let the class paths of a YAML decide which Lightning is used, before anything imports one.

    A path into one of the namespaces decides at once, through the environment variable that ranks inherit. Otherwise the modules
    of the user's own classes are imported, and the Lightning that they import is taken. The folder of the YAML and the working
    directory are put last on the import path, where they shadow nothing.

    Args:
        path: the YAML.
        options: the command line.
        home: the folder to import from, if it is not the YAML's.

    Raises:
        InputError: if both namespaces are named, or the variable says another one than the YAML.
    """
    sys.path.extend(folder for folder in (str(home or path.parent), os.getcwd()) if folder not in sys.path)
    content = read_yaml(path)
    words = [*_values(content), *(option.partition("=")[2] or option for option in options)]
    named = {namespace for word in words if (namespace := namespace_of(word))}
    if len(named) > 1:
        raise InputError(
            f"{path} names classes of both pytorch_lightning and lightning.pytorch, which do not fit together; keep to one"
        )
    if named:
        namespace = named.pop()
        if os.environ.setdefault(VARIABLE, namespace) != namespace:
            raise InputError(f"{path} names classes of {namespace}, but {VARIABLE} is {os.environ[VARIABLE]}; unset the variable")
        return
    if VARIABLE in os.environ:
        return
    for name in _values(content, "class_path"):
        module = name.rpartition(".")[0]
        if module and not module.startswith("lightning_plugins"):
            try:
                import_module(module)
            except ImportError:
                continue  # the parser refuses it later with the key that named it
    loaded = [name for name in sys.modules if name in NAMESPACES]
    if loaded:
        os.environ[VARIABLE] = loaded[0]


def call_target(target: Target, options: list[str], folder: RunFolder, resume: bool) -> None:
    """Run a recipe or a YAML in this process.

    Raises:
        InputError: if an option or a value in the YAML is wrong.
    """
    if target.recipe:
        config = ["--config", str(target.file)] if target.file else []
        import_module(target.recipe).main([*config, *options], folder, resume)
    else:
        from lightning_plugins.recipes.lightning_cli import run_yaml

        run_yaml(target.file or shipped_yaml(target.given), options, folder, resume)


def validate_yaml(path: Path) -> None:
    """Parse a YAML and build its model, data module and Trainer, without running them.

    Raises:
        InputError: if something in it is wrong.
    """
    from tempfile import TemporaryDirectory

    target = find_target(str(path))
    choose_yaml_namespace(path, [])
    from lightning_plugins.recipes.lightning_cli import RecipeCLI

    cli = getattr(import_module(target.recipe), "CLI", RecipeCLI) if target.recipe else RecipeCLI
    with TemporaryDirectory() as scratch:
        cli(RunFolder(Path(scratch)), ["--config", str(path)])


def _recipe(name: str) -> Target:
    module = f"lightning_plugins.recipes.{name}"
    return Target(name, recipe=module if find_spec(module) else None)


def _values(node: Any, key: str | None = None) -> Iterator[str]:
    """Yield every string in a YAML, at any depth; only those that stand under ``key``, if one is given."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in pairs:
        if isinstance(child, str):
            if key in (None, name):
                yield child
        else:
            yield from _values(child, key)
