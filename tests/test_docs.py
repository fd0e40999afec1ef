"""Every code block of the README and the pages is run: Python as it stands, commands in a folder with a photograph to run on."""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from lightning_plugins._support.methods import METHODS, RECIPES
from markdown_it import MarkdownIt
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Appended to a recipe that a page runs at full length: CI runs that length as `make demo`.
SHORT = {
    "panoramic_depth": "--data.train_rooms 8 --data.val_rooms 2 --data.test_rooms 2 --teacher_epochs 1 --trainer.max_epochs 1 --wandb disabled"
}


def blocks(language):
    """Every fenced block of a language, by page and line."""
    for page in PAGES:
        for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
            if token.type == "fence" and token.info == language:
                yield pytest.param(token.content, id=f"{page.relative_to(ROOT)}:{token.map[0] + 1}")


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
            assert re.search(rf"^make {word}\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE), f"CI does not call: {line}"
            continue
        assert program == "lightning", f"who runs this line? {line}"
        mine.append(" ".join([line, *(short for recipe, short in SHORT.items() if line.startswith(f"lightning run {recipe}"))]))
    for line, code, said in ranks.run(command_line, 1, mine, tmp_path, timeout_s=120)[0] if mine else []:
        # `doctor` exits with 1 where it finds a trap: that is its job, and depends on the machine.
        assert code == 0 or (line == "lightning doctor" and code == 1), (line, said)


def test_the_pages_have_blocks():
    assert len(list(blocks("python"))) >= 3
    assert len(list(blocks("bash"))) >= 4


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
