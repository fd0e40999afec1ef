"""The recipe as a user runs it: what it leaves, killed between its phases, with checkpoints given, what it refuses."""

import contextlib
import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.programs import wait_for

pytestmark = pytest.mark.adapter

SMALL = [
    *("--upright_data.train_rooms", "8", "--upright_data.val_rooms", "2", "--upright_data.height", "32"),
    *("--upright_data.batch_size", "4", "--upright.widths", "[8,12]", "--upright_epochs", "2"),
    *("--data.train_rooms", "8", "--data.val_rooms", "2", "--data.test_rooms", "6", "--data.height", "32"),
    *("--model.backbone", "test_resnet", "--model.backbone_options", "{}", "--model.widths", "[8,8,8,16,16]"),
    *("--model.sphere_widths", "[8,8,8]", "--trainer.max_epochs", "2", "--wandb", "disabled"),
]


def lightning(rank, world_size, *words):
    """What one process of the command line does; returns its exit code."""
    from lightning_plugins.cli import main

    return main(list(words))


def run_of(folder):
    (run,) = (folder / "level_then_depth").iterdir()
    return run


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "attic.png")
    words = [*SMALL, "--upright.max_expected_error_deg", "90", "--image", str(folder / "attic.png")]
    assert ranks.run(lightning, 1, "run", "level_then_depth", "--runs-dir", str(folder), *words, timeout_s=120) == [0]
    return run_of(folder)


def test_leaves_scores_and_a_point_cloud_in_the_level_frame(finished):
    rows = table(finished / "evaluation.csv")
    assert [row["way"] for row in rows] == ["direct", "levelled", "levelled, true up", "seen level"]
    assert {row["recovered_percent"] for row in rows if row["way"] == "seen level"} == {"100.0"}
    (row,) = table(finished / "levelled.csv")
    assert row["became"] == "levelled"
    matrix = np.array([[float(row[f"r{i}{j}"]) for j in range(3)] for i in range(3)])
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-5)
    assert b"element vertex 8192" in (finished / "photographs" / "attic_points.ply").read_bytes()[:400]
    assert "levelling recovers" in (finished / "report.html").read_text()
    for name in ("upright.ckpt", "depth.ckpt"):
        assert {key.split(".")[0] for key in torch.load(finished / name, weights_only=True)["state_dict"]} == {"network"}


@pytest.mark.timeout(200)
def test_killed_between_the_phases_it_goes_on_with_the_second(finished, ranks, tmp_path):
    words = ["run", "level_then_depth", "--runs-dir", str(tmp_path), *SMALL, "--upright.max_expected_error_deg", "90"]
    with ranks.start(lightning, 1, *words) as handle:
        wait_for(lambda: list(tmp_path.glob("level_then_depth/*/upright.ckpt")))
        handle.kill_at(0, 0.0)
        assert handle.join(30) == [-9]
    run = run_of(tmp_path)
    assert ranks.run(lightning, 1, "run", "--resume", str(run), timeout_s=120) == [0]
    for name in ("upright.ckpt", "depth.ckpt"):
        ours, theirs = (torch.load(one / name, weights_only=True)["state_dict"] for one in (run, finished))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [row["name"] for row in table(run / "levelled.csv")] == ["room_0", "room_1", "room_2"]


def test_checkpoints_skip_the_trainings(finished, ranks, tmp_path):
    given = ["--upright_ckpt", str(finished / "upright.ckpt"), "--depth_ckpt", str(finished / "depth.ckpt")]
    sizes = ["--data.height", "32", "--data.test_rooms", "6", "--wandb", "disabled"]
    words = ["run", "level_then_depth", "--runs-dir", str(tmp_path), *given, *sizes]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    run = run_of(tmp_path)
    assert not (run / "checkpoints").exists()
    assert table(run / "evaluation.csv") == table(finished / "evaluation.csv")


def refusals(rank, world_size, folder, cases):
    """Run the command line on each case; return exit codes and what was printed."""
    from lightning_plugins.cli import main

    answers = []
    for words in cases:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            answers.append((main(["run", "level_then_depth", "--runs-dir", str(folder), *words]), said.getvalue()))
    return answers


def test_bad_input_is_one_sentence_before_anything_is_trained(finished, ranks, tmp_path):
    cases = [
        (["--image", str(tmp_path / "none.jpg")], "none.jpg"),
        (["--upright_ckpt", str(tmp_path / "none.ckpt")], "does not exist"),
        (["--upright_ckpt", str(finished / "depth.ckpt")], "another model than PanoramicUpright"),
        (
            ["--depth_ckpt", str(finished / "depth.ckpt"), "--model.fusion", "concat"],
            "--model.fusion cannot act beside --depth_ckpt",
        ),
        (["--upright_epochs", "0"], "upright_epochs must be 1 or more, got 0"),
        (["--upright_data.tilt", "null"], "upright_data.tilt must name tilts"),
        (["--data.tilt", "small"], "data.tilt cannot act, got small"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs must be 1 or more, got 0"),
    ]
    (answers,) = ranks.run(refusals, 1, str(tmp_path / "runs"), [words for words, _ in cases], timeout_s=120)
    for (words, expected), (code, said) in zip(cases, answers, strict=True):
        assert code == 2, words
        assert expected in said, (words, said)
