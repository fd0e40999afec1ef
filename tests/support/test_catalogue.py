"""What ls, info and cp show, against the signatures that Python itself reports."""

import inspect
import re

import pytest

import lightning_plugins
from lightning_plugins._support.catalogue import PACKAGE, copy_recipe, describe, list_all
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.methods import METHODS, RECIPES


def test_every_name_is_listed_with_its_summary():
    text = list_all()
    for name, entry in {**METHODS, **RECIPES}.items():
        assert re.search(rf"^  {name} .*{re.escape(entry.summary)}$", text, re.MULTILINE), name


@pytest.mark.parametrize("name", METHODS)
def test_info_shows_the_signature_and_a_line_for_each_option(name):
    text = describe(name)
    assert METHODS[name].summary in text
    assert f"{METHODS[name].tier}, {METHODS[name].room}" in text
    parameters = list(inspect.signature(getattr(lightning_plugins, name).__init__).parameters.values())[1:]
    for parameter in parameters:
        line = re.search(rf"^  (\*\*)?{parameter.name}(:? .*)?$", text, re.MULTILINE)
        assert line, f"{name} has no line for {parameter.name}"
        if isinstance(parameter.default, str | int | float | bool | None):
            assert "= " in line[0], line[0]
        assert re.search(r"\S  +\S.*[a-z]{2}", line[0]), f"{name}.{parameter.name} has no docstring line"


@pytest.mark.parametrize("name", RECIPES)
def test_info_of_a_recipe_shows_its_knobs_and_a_copy_says_whose_it_is(name, tmp_path):
    shipped = (PACKAGE / "recipes" / f"{name}.yaml").read_text()
    assert shipped.rstrip() in describe(name)
    several = RECIPES[name].nproc_per_node
    assert ("It starts" in describe(name)) == (several > 1)
    assert several == 1 or f"It starts {several} processes; --nproc-per-node" in describe(name)
    assert re.search(rf"^recipe: {name}$", shipped, re.MULTILINE), "a copy must name the recipe whose script runs it"
    copy_recipe(name, tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == shipped


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(InputError, match="there is no 'PanoramicDept'; did you mean PanoramicDepth"):
        describe("PanoramicDept")
    with pytest.raises(InputError, match="no recipe is called 'panoramic_dept'; did you mean panoramic_depth"):
        copy_recipe("panoramic_dept", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("file", "words"),
    [("taken.yaml", "exists already and is not overwritten"), ("a.txt", "must end in .yaml"), ("no/a.yaml", "cannot be written")],
)
def test_cp_refuses_and_leaves_nothing(tmp_path, file, words):
    (tmp_path / "taken.yaml").write_text("mine")
    with pytest.raises(InputError, match=words):
        copy_recipe("panoramic_depth", tmp_path / file)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("taken.yaml", "mine")]
