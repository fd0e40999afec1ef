"""The recipe as a user runs it, in processes of its own: what it leaves, kills in both phases, two ranks, a checkpoint given."""

import csv
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks.client import kill_times
from tests.recipes.programs import wait_for
from tests.recipes.small_recipe import DATA, EPOCHS, LOSSES, SMALL, lightning, losses, metrics, run_of, same_student, scores

pytestmark = pytest.mark.adapter


def test_leaves_what_the_card_promises(finished):
    rows = scores(finished)
    assert list(rows) == ["student", "constant_median", "row_median"]
    columns = ["predictor", "preset", "abs_rel", "mae", "rmse", "rmse_log", "delta1", "delta2", "delta3", "images"]
    assert list(rows["student"]) == columns
    assert rows["student"]["images"] == "5"
    steps = losses(finished)
    assert {phase for phase, _ in steps} == {"teacher", "student"}
    assert len(steps) == 2 * 3 * 4
    for name in ("attic_png", "attic_jpg"):
        depth = np.asarray(Image.open(finished / "photographs" / f"{name}_depth.png"))
        assert depth.dtype in (np.uint16, np.int32)
        assert depth.shape == (64, 128)
        assert depth.min() > 0
        assert b"element vertex 8192" in (finished / "photographs" / f"{name}_points.ply").read_bytes()[:400]
        assert (finished / "photographs" / f"{name}_preview.png").stat().st_size > 1000
    assert list((finished / "previews").glob("epoch_*_sample_0.png"))


def test_the_report_is_one_file_that_opens_offline(finished):
    addresses = []

    class Page(HTMLParser):
        def handle_starttag(self, tag, attributes):
            addresses.extend(value for name, value in attributes if name in ("src", "href"))

    Page().feed((finished / "report.html").read_text())
    assert len(addresses) >= 3
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_the_deployed_file_holds_no_teacher(finished):
    student = torch.load(finished / "student.ckpt", weights_only=True)
    teacher = torch.load(finished / "teacher.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in student["state_dict"]} == {"network"}
    assert not [key for key in student["state_dict"] if "teacher" in key or "adapter" in key]
    assert [key for key in teacher["state_dict"] if "encoder" in key], "the teacher's own keys"
    assert not [key for key in student["state_dict"] if "network.encoder" in key]


def test_callbacks_of_the_users_own_are_new_in_each_phase(finished):
    assert {row["phase"] for row in metrics(finished) if row["lr-AdamW"]} == {"teacher", "student"}
    states = {}
    for phase in ("teacher", "student"):
        states[phase] = torch.load(finished / "checkpoints" / phase / "epoch=2.ckpt", weights_only=True)["callbacks"]
    assert not [key for key in states["teacher"] if key.startswith("EarlyStopping")], "it monitors the student"
    (state,) = (state for key, state in states["student"].items() if key.startswith("EarlyStopping"))
    seen = [float(row["panoramic_depth/val_abs_rel"] or "inf") for row in metrics(finished)]
    assert float(state["best_score"]) == pytest.approx(min(seen))


def test_the_two_newest_checkpoints_are_kept(finished):
    for phase in ("teacher", "student"):
        names = sorted(path.name for path in (finished / "checkpoints" / phase).iterdir())
        assert names == ["epoch=1.ckpt", "epoch=2.ckpt"]


@pytest.mark.timeout(300)
def test_killed_in_both_phases_and_resumed_it_has_the_same_losses(finished, ranks, tmp_path):
    words = ["run", "panoramic_depth", "--runs-dir", str(tmp_path), *SMALL, *EPOCHS]
    for phase, seed in (("teacher", 1), ("student", 2)):
        # Anywhere from when the phase's logs appear until shortly before its end, by the clock.
        took_s = (finished / f"{phase}.ckpt").stat().st_mtime - begun(finished, phase)
        _, seconds = next(kill_times(seed, world_size=1, within_s=0.8 * took_s))
        with ranks.start(lightning, 1, *words) as handle:
            wait_for(lambda phase=phase: list(tmp_path.glob(f"panoramic_depth/*/logs/{phase}-0")))
            handle.kill_at(0, seconds)
            assert handle.join(30) == [-9]
        run = run_of(tmp_path)
        assert not (run / f"{phase}.ckpt").exists(), f"the kill came too late to be in the middle of the {phase}"
        words = ["run", "--resume", str(run)]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    assert losses(run) == losses(finished)
    assert same_student(run, finished)
    assert not list(run.rglob(".*.part")), "half-written files"


def begun(run, phase):
    """Return when a phase of a finished run had its folder of logs: as old as the first file in it."""
    return min(path.stat().st_mtime for path in (run / "logs" / f"{phase}-0").iterdir())


def test_a_checkpoint_that_was_cut_off_is_passed_over_for_the_one_before(finished, ranks, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "student.ckpt").unlink()
    (run / "run.json").write_text((run / "run.json").read_text().replace('"student",', "").replace('"run"', '"none"'))
    newest = run / "checkpoints" / "student" / "epoch=2.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with ranks.start(lightning, 1, "run", "--resume", str(run)) as handle:
        assert handle.join(120) == [0]
        said = handle.output(0)
    assert f"{newest} is no readable checkpoint" in said
    assert f"the run goes on from {newest.with_name('epoch=1.ckpt')}, at step 8" in said
    with (run / "logs" / "student-1" / "metrics.csv").open(newline="") as file:
        assert len([row for row in csv.DictReader(file) if row[LOSSES["student"]]]) == 4, "more or less than the last epoch"
    assert losses(run) == losses(finished)
    assert same_student(run, finished)
    assert torch.load(newest, weights_only=True)["global_step"] == 12


def of_two(rank, world_size, path, options):
    """What one of two ranks of the recipe does; returns whether the photographs were done when it ended."""
    from lightning_plugins._support.run_folder import RunFolder
    from lightning_plugins.recipes.panoramic_depth import main

    main(options, RunFolder(Path(path)), False)
    return (Path(path) / "photographs" / "room_2_preview.png").exists()


def test_two_ranks_run_all_of_it_and_the_first_scores_every_room(ranks, tmp_path):
    from lightning_plugins._support.run_folder import RunFolder

    run = RunFolder.create(tmp_path, "panoramic_depth", SMALL).path
    options = [*SMALL, *EPOCHS, "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=panoramic_depth/val_abs_rel"]
    assert ranks.run(of_two, 2, str(run), options, init=False, timeout_s=120) == [True, True], "the second did not wait"
    assert {name: row["images"] for name, row in scores(run).items()} == dict.fromkeys(scores(run), "5")
    assert len(losses(run)) == 2 * 3 * 2
    assert len(list((run / "photographs").glob("*.ply"))) == 3


def test_a_checkpoint_skips_the_training(finished, ranks, tmp_path):
    words = ["run", "panoramic_depth", "--runs-dir", str(tmp_path), *DATA, "--ckpt", str(finished / "student.ckpt")]
    assert ranks.run(lightning, 1, *words, "--model.preset", "aligned", timeout_s=120) == [0]
    run = run_of(tmp_path)
    assert not (run / "checkpoints").exists()
    assert {row["preset"] for row in scores(run).values()} == {"aligned"}
    assert scores(run)["student"]["abs_rel"] != scores(finished)["student"]["abs_rel"]
    assert {row["preset"] for row in scores(finished).values()} == {"unifuse"}
    # Without photographs, held-out rooms are shown.
    assert sorted(path.name for path in (run / "photographs").glob("*.ply")) == [f"room_{i}_points.ply" for i in range(3)]


def test_a_teacher_of_the_users_own_is_used_and_none_is_trained(finished, ranks, tmp_path):
    words = ["run", "panoramic_depth", "--runs-dir", str(tmp_path), *SMALL, "--model.teacher", str(finished / "teacher.ckpt")]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    run = run_of(tmp_path)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["student"]
    assert not (run / "teacher.ckpt").exists()
    assert losses(run) == losses(finished, phases=("student",))
    assert same_student(run, finished)


def test_photographs_are_read_one_at_a_time(finished, tmp_path):
    from lightning_plugins.recipes.panoramic_depth import images

    whole = next((finished.parents[2]).glob("photographs*/attic.png"))
    one_after_the_other = images({"whole": whole, "gone": tmp_path / "gone.png"}, None)
    assert next(one_after_the_other)[0] == "whole"
    with pytest.raises(ValueError, match=r"gone\.png"):
        next(one_after_the_other)
