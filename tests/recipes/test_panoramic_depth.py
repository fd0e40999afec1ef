"""The recipe as a user runs it, in processes of its own: what it leaves, real kills in both phases, all bad input of its own."""

import csv
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks.client import kill_times

pytestmark = pytest.mark.adapter

# The smallest run that has everything: three epochs of each phase, on the smallest backbone.
DATA = [
    "--data.train_rooms",
    "16",
    "--data.val_rooms",
    "1",
    "--data.test_rooms",
    "5",
    "--data.height",
    "32",
    "--data.batch_size",
    "4",
]
DATA += ["--wandb", "disabled"]
SMALL = [
    *("--model.backbone", "test_resnet", "--model.backbone_options", "{}"),
    *("--model.widths", "[8,8,8,16,16]", "--model.sphere_widths", "[8,8,8]"),
    *("--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"),
    *DATA,
]
EPOCHS = ["--teacher_epochs", "3"]
# Callbacks of the user's own: one for both phases, and one that monitors the student alone.
CALLBACKS = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=EarlyStopping"]
CALLBACKS += ["--trainer.callbacks.monitor=panoramic_depth/val_abs_rel", "--trainer.callbacks.patience=9"]


def lightning(rank, world_size, *words):
    """What one process of the command line does; returns its exit code."""
    from lightning_plugins.cli import main

    return main(list(words))


def run_of(folder):
    (run,) = (folder / "panoramic_depth").iterdir()
    return run


LOSSES = {"teacher": "depth_teacher/train_loss", "student": "panoramic_depth/train_loss"}


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run, phases=("teacher", "student")):
    rows = metrics(run)
    found = {}
    for row in rows:
        name = LOSSES[row["phase"]]
        if row["phase"] in phases and row[name]:
            found[row["phase"], row["step"]] = row[name]
    return found


def scores(run):
    with (run / "evaluation.csv").open(newline="") as file:
        return {row["predictor"]: row for row in csv.DictReader(file)}


def same_student(one, other):
    ours, theirs = (torch.load(run / "student.ckpt", weights_only=True)["state_dict"] for run in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory):
    """A run that nothing disturbed, with callbacks of the user's own, on two photographs of one stem."""
    folder = tmp_path_factory.mktemp("runs")
    photographs = tmp_path_factory.mktemp("photographs")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    for name in ("attic.png", "attic.jpg"):
        Image.fromarray(pixels).save(photographs / name)
    words = ["run", "panoramic_depth", "--runs-dir", str(folder), *SMALL, *EPOCHS, *CALLBACKS, "--image", str(photographs)]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    return run_of(folder)


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


def wait_for(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.01)


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
    """What one of two ranks of the recipe does; returns whether the report was there when it ended."""
    from lightning_plugins._support.run_folder import RunFolder
    from lightning_plugins.recipes.panoramic_depth import main

    main(options, RunFolder(Path(path)), False)
    return (Path(path) / "report.html").exists()


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


def refusals(rank, world_size, folder, cases):
    """Run the command line on each case; return exit codes and what was printed."""
    import contextlib
    import io

    from lightning_plugins.cli import main

    answers = []
    for words in cases:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            answers.append((main(["run", "panoramic_depth", "--runs-dir", str(folder), *words]), said.getvalue()))
    return answers


def test_bad_input_is_one_sentence_before_anything_is_trained(finished, ranks, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "square.png")
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 torn")
    torch.save({"state_dict": {}, "hyper_parameters": {"vocabulary": 3}}, tmp_path / "foreign.ckpt")
    (tmp_path / "whole.ckpt").write_bytes((finished / "student.ckpt").read_bytes())
    whole, teacher = str(tmp_path / "whole.ckpt"), str(finished / "teacher.ckpt")
    (tmp_path / "wrong.yaml").write_text("recipe: panoramic_depth\ndata: {height: 50}\n")
    cases = [
        (["--image", str(tmp_path / "none.jpg")], "none.jpg"),
        (["--image", str(tmp_path / "square.png")], "64 x 64"),
        (["--image", str(tmp_path / "torn.jpg")], "torn.jpg"),
        (["--image", str(tmp_path / "empty")], "empty"),
        (["--ckpt", str(tmp_path / "none.ckpt")], "does not exist"),
        (["--ckpt", str(tmp_path / "torn.ckpt")], "truncated or no checkpoint"),
        (["--ckpt", str(tmp_path / "foreign.ckpt")], "another model than PanoramicDepth"),
        (["--imgae", "x.jpg"], "--image"),
        (["--data.train_rooms", "many"], "train_rooms"),
        (["--data.height", "50"], "height must be a multiple of 32"),
        (["--model.fusion", "gated"], "did you mean band_gated"),
        (["--model.backbone", "resnet18x"], "backbone must be a model of timm"),
        (["--teacher_epochs", "0"], "teacher_epochs must be 1 or more"),
        (["--trainer.max_epochs", "-1"], "trainer.max_epochs must be 1 or more, got -1"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs must be 1 or more, got 0"),
        (["--trainer.max_steps", "0"], "trainer.max_steps must be 1 or more, got 0"),
        (["--trainer.strategy", "wibble"], "invalid strategy name"),
        (["--trainer.precision", "wibble"], "trainer.precision must be"),
        (["--model.teacher", str(tmp_path / "none.ckpt")], "none.ckpt does not exist"),
        (["--model.teacher", whole], "another model than DepthTeacher"),
        (["--model.teacher", teacher, "--teacher_epochs", "2"], "--teacher_epochs cannot act"),
        (["--model.teacher", teacher, "--model.distillation_weight", "0"], "--model.teacher cannot act"),
        (["--ckpt", whole], "--model.backbone cannot act beside --ckpt"),
        (["--config", str(tmp_path / "wrong.yaml")], "height must be a multiple of 32"),
    ]
    folder = tmp_path / "runs"
    ((*answers,),) = ranks.run(refusals, 1, folder, [[*SMALL, *words] for words, _ in cases], timeout_s=120)
    for (words, sentence), (code, said) in zip(cases, answers, strict=True):
        assert code == 2, (words, said)
        lines = [line for line in said.splitlines() if line.startswith("lightning: ")]
        assert len(lines) == 1, (words, said)
        assert sentence in lines[0], (words, lines[0])
        assert "Traceback" not in said
    assert not [path for path in folder.rglob("*") if path.is_file()], "something was written"


def test_what_lightning_refuses_inside_fit_is_one_sentence(ranks, tmp_path):
    (((code, said),),) = ranks.run(refusals, 1, tmp_path, [[*SMALL, "--trainer.val_check_interval", "1000"]], timeout_s=120)
    assert code == 2, said
    assert "Traceback" not in said
    assert "`val_check_interval` (1000) must be less than or equal to" in said.splitlines()[-1]


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(ranks, full_disk):
    ((code, said),) = ranks.run(refusals, 1, full_disk, [SMALL], timeout_s=120)[0:1][0]
    assert code == 2, said
    assert "free space" in said.splitlines()[-1]
    for file in full_disk.rglob("*.ckpt"):
        torch.load(file, weights_only=False)


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 300 kB: enough for the run folder and its logs, too small for the first checkpoint."""
    import os
    import subprocess

    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_an_unwritable_run_folder_is_one_sentence(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    ((code, said),) = ranks.run(refusals, 1, Path(tmp_path / "file"), [SMALL])[0]
    assert code == 2
    assert "cannot be written" in said
    assert "--runs-dir" in said
