"""Every committed mutation is killed, and the runner is not fooled by patches and tests that show nothing."""

import re
import shutil
from difflib import unified_diff

import pytest

from tests.mutations.in_copy import run_pytest
from tests.mutations.run import ROOT, Runner, find, read

MUTATIONS = find()
TEST = "tests/ranks/test_failpoints.py::test_acts_at_the_nth_hit_and_never_again"
FILE = "lightning_plugins/_support/failpoints.py"


@pytest.fixture(scope="session")
def runner(ranks):
    return Runner(ranks)


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(mutation, id=mutation.name, marks=[] if mutation.quick else [pytest.mark.slow]) for mutation in MUTATIONS],
)
def test_is_killed(runner, mutation):
    verdict = runner.judge(mutation)
    if verdict.word == "skipped":
        pytest.skip(verdict.detail)
    assert verdict.word == "killed", verdict.detail


def _mutation(folder, old, new, test=TEST):
    text = (ROOT / FILE).read_text()
    assert old in text
    lines = [part.splitlines(keepends=True) for part in (text, text.replace(old, new))]
    patch = folder / "trial.patch"
    patch.write_text(f"# kills: {test}\n# why: a trial\n{''.join(unified_diff(*lines, f'a/{FILE}', f'b/{FILE}'))}")
    return read(patch, folder)


@pytest.mark.parametrize(
    ("old", "new", "test", "word", "detail"),
    [
        ("raised", "raised itself", TEST, "survived", "green although: a trial"),
        ("import errno", "import no_such_module", TEST, "broken", "could not run(.|\n)*no_such_module"),
        ("raised", "raised itself", f"{TEST}_renamed", "broken", "not green without the patch"),
        ("raised", "raised itself", "tests/ranks/test_wrong_file.py::test_x", "broken", "not green without the patch"),
    ],
)
def test_what_shows_nothing_is_no_kill(runner, tmp_path, old, new, test, word, detail):
    verdict = runner.judge(_mutation(tmp_path, old, new, test))
    assert verdict.word == word
    assert re.search(detail, verdict.detail)


def test_a_patch_that_no_longer_applies_is_reported(runner, tmp_path):
    mutation = _mutation(tmp_path, "import errno", "import time as errno")
    mutation.patch.write_text(mutation.patch.read_text().replace("-import errno", "-import errors"))
    verdict = runner.judge(mutation)
    assert verdict.word == "broken"
    assert "no longer applies; make it anew" in verdict.detail


def test_code_from_elsewhere_is_noticed(ranks, tmp_path):
    """The trap of an editable install: a copy that lacks the package, so that the original is found instead."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    elsewhere = {"PYTHONPATH": str(tmp_path)}
    outcome = ranks.at(tmp_path).run(run_pytest, 1, str(tmp_path), TEST, init=False, env=elsewhere)[0]
    assert outcome.collection_errors or "lightning_plugins._support.failpoints" in outcome.foreign_modules


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# kills", "# catches", "no line `# kills: ...`"),
        ("# why: a trial\n", "", "no line `# why: ...`"),
        ("lightning_plugins/_support/failpoints.py", "tests/ranks/test_failpoints.py", "a mutation changes files of"),
        ("+++ b/", "", "changes no file"),
    ],
)
def test_bad_patches_are_refused(tmp_path, old, new, message):
    patch = _mutation(tmp_path, "import errno", "import time as errno").patch
    patch.write_text(patch.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        read(patch, tmp_path)


def test_an_unknown_area_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no mutations in nowhere; areas are (.*)support"):
        find("nowhere")
