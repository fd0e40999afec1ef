"""The W&B run of the recipe, with the real wandb, offline: it is there, with no photograph unasked; a resumed run has one too."""

import numpy as np
import pytest
from PIL import Image

from tests.recipes.small_recipe import DATA, EPOCHS, SMALL, lightning, run_of

pytest.importorskip("wandb")
TINY = [*SMALL, *EPOCHS, "--trainer.max_epochs", "1", "--teacher_epochs", "1"]
OFFLINE = ["--wandb", "offline"]


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs") / "attic.png"
    Image.fromarray(np.full((64, 128, 3), 90, np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def run(ranks, photograph, tmp_path_factory):
    """A run that says nothing of photographs but which one to predict on."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["run", "panoramic_depth", "--runs-dir", str(folder), *TINY, *OFFLINE, "--image", str(photograph)]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    return run_of(folder)


def attempts(run):
    return sorted((run / "wandb").glob("offline-run-*"))


def pictures(attempt):
    return {path.name.partition("_")[0] for path in attempt.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg")}


def mentions(attempt, name):
    return [path for path in attempt.rglob("*") if path.is_file() and name.encode() in path.read_bytes()]


def test_the_offline_run_holds_the_rooms_and_no_photograph(run):
    (attempt,) = attempts(run)
    assert next(attempt.glob("*.wandb")).stat().st_size > 1000
    assert pictures(attempt) == {"preview"}, "the previews of rendered rooms alone belong into it"
    assert not mentions(attempt, "attic")
    assert (run / "photographs" / "attic_preview.png").exists()


def test_it_holds_photographs_when_asked(run, ranks, photograph, tmp_path):
    words = ["run", "panoramic_depth", "--runs-dir", str(tmp_path), *DATA, *OFFLINE, "--image", str(photograph)]
    words += ["--ckpt", str(run / "student.ckpt"), "--wandb_photographs", "true"]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    (attempt,) = attempts(run_of(tmp_path))
    assert pictures(attempt) == {"depth"}
    assert mentions(attempt, "attic")


def test_a_resumed_run_leaves_a_second_folder_of_the_same_id(run, ranks):
    (run / "run.json").write_text((run / "run.json").read_text().replace('"run"', '"none"'))
    assert ranks.run(lightning, 1, "run", "--resume", str(run), timeout_s=120) == [0]
    assert len(attempts(run)) == 2
    assert len({path.name.rpartition("-")[2] for path in attempts(run)}) == 1
    assert not [path for attempt in attempts(run) for path in mentions(attempt, "attic")]
