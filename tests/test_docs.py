"""The README and the pages keep what they promise.

Every code block is run, Python as it stands, commands in a folder with a photograph to run on; what the pages say of options,
versions and measurements is compared with the code, the constraints and the files of results.
"""

import ast
import contextlib
import csv
import io
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from lightning_plugins._support.methods import METHODS, RECIPES
from lightning_plugins.engines import preconditioning

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Appended to a recipe that a page runs at full length: CI runs that length as `make demo`.
SHORT = {
    "panoramic_depth": "--data.train_rooms 8 --data.val_rooms 2 --data.test_rooms 2 --teacher_epochs 1 --trainer.max_epochs 1 "
    "--wandb disabled",
    "panoramic_upright": "--data.train_rooms 8 --data.val_rooms 2 --data.test_rooms 2 --data.height 32 --model.widths '[8, 12]' "
    "--trainer.max_epochs 1 --wandb disabled",
    "level_then_depth": "--upright_data.train_rooms 8 --upright_data.val_rooms 2 --upright_data.height 32 "
    "--upright.widths '[8, 12]' --upright_epochs 1 --data.train_rooms 8 --data.val_rooms 2 --data.test_rooms 2 "
    "--trainer.max_epochs 1 --wandb disabled",
    "precondition_compare": "--methods '[adamw, kfac]' --steps 6 --trials 1 --wandb disabled",
    "ok_topk_compare": "--tasks '[character_transformer]' --steps 4 --wandb disabled",
}


def blocks(language):
    """Every fenced block of a language, by the page and line where it stands first."""
    found = {}
    for page in PAGES:
        for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
            if token.type == "fence" and token.info == language:
                found.setdefault(token.content, f"{page.relative_to(ROOT)}:{token.map[0] + 1}")
    return [pytest.param(content, id=place) for content, place in found.items()]


def execute(rank, world_size, code, folder):
    os.chdir(folder)
    exec(compile(code, "page", "exec"), {"__name__": "__main__"})


def command_line(rank, world_size, lines, folder):
    from lightning_plugins.cli import main

    os.chdir(folder)
    answers = []
    for line in lines:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            answers.append((line, main(shlex.split(line)[1:]), said.getvalue()[-500:]))
    return answers


@pytest.mark.docs
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, ranks, tmp_path):
    ranks.run(execute, 1, code, tmp_path, timeout_s=120, env={"LIGHTNING_PLUGINS_NAMESPACE": "pytorch_lightning"})


@pytest.mark.docs
@pytest.mark.parametrize("commands", blocks("bash"))
def test_commands_run(commands, ranks, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "my_panorama.jpg")
    mine = []
    for line in commands.strip().splitlines():
        program, word = shlex.split(line)[:2]
        if program == "make":
            assert re.search(rf"^timed make {word}\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE), (
                f"CI does not call: {line}"
            )
            continue
        if program == "source":
            assert f"VENV := {word.removesuffix('/bin/activate')}\n" in (ROOT / "Makefile").read_text()
            continue
        assert program == "lightning", f"who runs this line? {line}"
        mine.append(" ".join([line, *(short for recipe, short in SHORT.items() if line.startswith(f"lightning run {recipe}"))]))
    for line, code, said in ranks.run(command_line, 1, mine, tmp_path, timeout_s=120)[0] if mine else []:
        # `doctor` exits with 1 where it finds a trap: that is its job, and depends on the machine.
        assert code == 0 or (line == "lightning doctor" and code == 1), (line, said)


def test_the_pages_have_blocks():
    assert len(blocks("python")) >= 2
    assert len(blocks("bash")) >= 4


def test_readme_and_cards_name_every_method_and_recipe_with_its_tier():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, method in METHODS.items():
        card = ROOT / "docs" / "methods" / f"{method.card}.md"
        assert f"`{name}`" in readme, f"README has no row of {name}"
        assert f"`{method.tier}`" in card.read_text(encoding="utf-8"), f"{card.name} does not say that {name} is {method.tier}"
    for name in RECIPES:
        assert f"lightning run {name}" in readme


def test_every_number_names_a_file_that_exists():
    for page in PAGES:
        for named in re.findall(r"benchmarks/[\w/]+\.(?:csv|py)", page.read_text(encoding="utf-8")):
            assert (ROOT / named).is_file(), f"{page.name} names {named}"


def test_no_place_is_left_to_be_filled():
    assert [page.name for page in PAGES if "@@" in page.read_text(encoding="utf-8")] == []


def numbers(text):
    """The numbers of a text as they are written; those inside names, such as ``delta1`` or ``64x128``, are none."""
    return re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\w)", text)


def test_every_number_of_the_readmes_tables_is_in_the_file_it_cites():
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        for cell in line.strip("|").split("|") if line.startswith("|") else []:
            cited = re.findall(r"benchmarks/results/[\w/]+\.csv", cell)
            if not cited:
                continue
            measured = [float(x) for file in cited for row in csv.reader((ROOT / file).open()) for x in numbers(" ".join(row))]
            for number in numbers(re.sub(r"\]\([^)]*\)|\S*benchmarks/\S*", "", cell)):
                half_a_digit = 0.5 * 10.0 ** -len(number.partition(".")[2]) * (1 + 1e-9)
                assert any(abs(float(number) - value) <= half_a_digit for value in measured), (
                    f"{number} is not in {cited}: {cell}"
                )


def test_numbers_are_read_as_they_are_written():
    assert numbers("0.14, 128 rooms, 64x128, delta1, -2.50 (7%) 2.6.") == ["0.14", "128", "-2.50", "7", "2.6"]


def test_the_readme_states_the_versions_that_are_tested():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for file, column in (("constraints-oldest.txt", 2), ("constraints.txt", 3)):
        pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / file).read_text(), re.MULTILINE))
        assert pins["pytorch-lightning"] == pins["lightning"]
        for name, package in (("torch", "torch"), ("Lightning", "pytorch-lightning")):
            row = next(line for line in readme.splitlines() if line.startswith(f"| {name} "))
            assert row.split("|")[column].split(",")[0].strip() == pins[package], f"{file} pins another {package}"


@pytest.mark.parametrize(("card", "name"), [("panoramic_depth", "PanoramicDepth"), ("panoramic_upright", "PanoramicUpright")])
def test_the_card_shows_every_option_with_its_default(card, name):
    module = ROOT / "lightning_plugins" / "models" / card / "module.py"
    tree = ast.parse(module.read_text(encoding="utf-8"))
    constants = {part.targets[0].id: part.value for part in tree.body if isinstance(part, ast.Assign)}
    model = next(part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == name)
    arguments = next(part for part in model.body if isinstance(part, ast.FunctionDef) and part.name == "__init__").args
    values = [ast.literal_eval(constants[node.id] if isinstance(node, ast.Name) else node) for node in arguments.defaults]
    options = dict(zip((argument.arg for argument in arguments.args[1:]), values, strict=True))
    shown = {}
    for line in (ROOT / "docs" / "methods" / f"{card}.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names, default = line.split("|")[1:3]
            names = re.findall(r"`(\w+)`", names)
            shown |= zip(names, default.split(",") if len(names) > 1 else [default], strict=True)
    assert set(shown) == set(options)
    for name, value in options.items():
        text = shown[name].strip(" `")
        expected = ", ".join(map(str, value)) if isinstance(value, list) else str(value).lower()
        assert text == expected or (isinstance(value, float) and float(text) == value), f"{name} is {value}, the card says {text}"


def test_the_page_of_the_command_line_shows_every_word_and_option():
    from lightning_plugins.cli import _COMMANDS
    from lightning_plugins.recipes.launch_options import run_parser

    page = (ROOT / "docs" / "reference" / "command_line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `lightning (\w+)", page, re.MULTILINE)) == set(_COMMANDS)
    options = {flag for action in run_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert set(re.findall(r"^\| `(--[\w-]+)", page, re.MULTILINE)) == options - {"--help"}


def test_every_public_name_has_a_reference():
    reference = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    for name, method in METHODS.items():
        assert f"::: {method.module}.{name}\n" in reference, f"no page under docs/reference shows {name}"


def test_the_card_of_preconditioning_lists_every_method():
    card = (ROOT / "docs" / "methods" / "preconditioner.md").read_text(encoding="utf-8")
    for name, entry in preconditioning.METHODS.items():
        cells = (f"`{name}`", entry.curvature, entry.granularity, entry.solver, entry.extra_passes, entry.memory)
        assert f"| {' | '.join(cells)} |" in card, f"the card's row of {name} must be: | {' | '.join(cells)} |"
