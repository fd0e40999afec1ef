"""The recipe as a user runs it, in processes of its own: what it leaves, real kills in both phases, and every bad input of its own."""

import csv
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.adapter

# The smallest run that has everything: two epochs of each phase and more, on the smallest backbone.
SMALL = [
    *("--model.backbone", "test_resnet", "--model.backbone_options", "{}", "--model.widths", "[8,8,8,16,16]", "--model.sphere_widths", "[8,8,8]"),
    *("--data.train_rooms", "16", "--data.val_rooms", "2", "--data.test_rooms", "4", "--data.height", "32", "--data.batch_size", "4"),
    *("--teacher_epochs", "3", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", "--wandb", "disabled"),
]


def lightning(rank, world_size, *words):
    """What one process of the command line does; returns its exit code."""
    from lightning_plugins.cli import main

    return main(list(words))


def run_of(folder):
    (run,) = (folder / "panoramic_depth").iterdir()
    return run


def losses(run):
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = {"teacher": "depth_teacher/train_loss", "student": "panoramic_depth/train_loss"}
    return {(row["phase"], row["step"]): loss for row in rows if (loss := row[keys[row["phase"]]])}


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory):
    """A run that nothing disturbed, on a photograph."""
    folder = tmp_path_factory.mktemp("runs")
    photographs = tmp_path_factory.mktemp("photographs")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photographs / "attic.png")
    assert ranks.run(lightning, 1, "run", "panoramic_depth", "--runs-dir", str(folder), *SMALL, "--image", str(photographs), timeout_s=120) == [0]
    return run_of(folder)


def test_leaves_what_the_card_promises(finished):
    with (finished / "evaluation.csv").open(newline="") as file:
        rows = {row["predictor"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["student", "constant_median", "row_median"]
    assert list(rows["student"]) == ["predictor", "preset", "abs_rel", "mae", "rmse", "rmse_log", "delta1", "delta2", "delta3", "images"]
    assert rows["student"]["images"] == "4"
    steps = losses(finished)
    assert {phase for phase, _ in steps} == {"teacher", "student"}
    assert len(steps) == 2 * 3 * 4
    depth = np.asarray(Image.open(finished / "photographs" / "attic_depth.png"))
    assert depth.dtype in (np.uint16, np.int32)
    assert depth.shape == (64, 128)
    assert depth.min() > 0
    header = (finished / "photographs" / "attic_points.ply").read_bytes()[:400]
    assert b"element vertex 8192" in header
    assert (finished / "photographs" / "attic_preview.png").stat().st_size > 1000
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


@pytest.mark.timeout(300)
def test_killed_in_both_phases_and_resumed_it_has_the_same_losses(finished, ranks, tmp_path):
    words = ["run", "panoramic_depth", "--runs-dir", str(tmp_path), *SMALL]
    for phase in ("teacher", "student"):
        with ranks.start(lightning, 1, *words) as handle:
            wait_for(lambda phase=phase: list(tmp_path.glob(f"panoramic_depth/*/checkpoints/{phase}/last.ckpt")))
            handle.kill(0)
            assert handle.join(30) == [-9]
        run = run_of(tmp_path)
        assert not (run / f"{phase}.ckpt").exists(), f"the kill came too late to be in the middle of the {phase}"
        words = ["run", "--resume", str(run)]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    assert losses(run) == losses(finished)
    ours, theirs = (torch.load(r / "student.ckpt", weights_only=True)["state_dict"] for r in (run, finished))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(run.rglob(".*.ckpt.*")), "half-written files"


def wait_for(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.01)


def test_a_checkpoint_skips_the_training(finished, ranks, tmp_path):
    words = ["run", "panoramic_depth", "--runs-dir", str(tmp_path), *SMALL, "--ckpt", str(finished / "student.ckpt")]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    run = run_of(tmp_path)
    assert not (run / "checkpoints").exists()
    assert (run / "evaluation.csv").read_text() == (finished / "evaluation.csv").read_text()
    # Without photographs, held-out rooms are shown.
    assert sorted(path.name for path in (run / "photographs").glob("*.ply")) == [f"room_{i}_points.ply" for i in range(3)]


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


def test_bad_input_is_one_sentence_before_anything_is_trained(ranks, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "square.png")
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 torn")
    torch.save({"state_dict": {}, "hyper_parameters": {"vocabulary": 3}}, tmp_path / "foreign.ckpt")
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


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(ranks, full_disk):
    ((code, said),) = ranks.run(refusals, 1, full_disk, [SMALL], timeout_s=120)[0:1][0]
    assert code == 2, said
    assert "No space left" in said.splitlines()[-1]
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
