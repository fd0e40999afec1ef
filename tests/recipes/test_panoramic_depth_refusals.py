"""All bad input of the recipe: one sentence, exit code 2, before anything is trained, and no half-written file."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.recipes.small_recipe import SMALL


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
        (["--trainer.logger", "false"], "trainer.logger cannot act, got False"),
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
