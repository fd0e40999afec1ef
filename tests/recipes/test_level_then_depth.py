"""The recipe as a user runs it: what it leaves, killed between its phases, with checkpoints given, what it refuses."""

import contextlib
import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_plugins import RenderedRooms
from tests.models.panoramic_upright.test_reconstruction import level_directions
from tests.recipes.programs import wait_for

pytestmark = pytest.mark.adapter

SMALL = [
    *("--upright_data.train_rooms", "8", "--upright_data.val_rooms", "2", "--upright_data.height", "32"),
    *("--upright_data.batch_size", "4", "--upright.widths", "[8,12]", "--upright_epochs", "2"),
    *("--data.train_rooms", "8", "--data.val_rooms", "2", "--data.test_rooms", "6", "--data.height", "32"),
    *("--model.backbone", "test_resnet", "--model.backbone_options", "{}", "--model.widths", "[8,8,8,16,16]"),
    *("--model.sphere_widths", "[8,8,8]", "--trainer.max_epochs", "2", "--wandb", "disabled"),
]

SURE = ["--upright.max_expected_error_deg", "89.9"]


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
    folder, photographs = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("photographs")
    Image.fromarray(attic()).save(photographs / "attic.png")
    Image.new("RGB", (128, 64), (90, 90, 90)).save(photographs / "grey.png")
    before = {path.name: path.read_bytes() for path in photographs.iterdir()}
    # Hardly trained, it is nearly as unsure as where there is no cue, which is 90 degrees.
    words = [*SMALL, *SURE, "--image", str(photographs)]
    assert ranks.run(lightning, 1, "run", "level_then_depth", "--runs-dir", str(folder), *words, timeout_s=120) == [0]
    assert {path.name: path.read_bytes() for path in photographs.iterdir()} == before, "the input was written to"
    return run_of(folder)


def attic():
    """A photograph whose colour tells the direction that it was seen in."""
    return np.rint(127.5 + 100 * level_directions(64)).astype(np.uint8)


def cloud(path):
    header, _, body = path.read_bytes().partition(b"end_header\n")
    points = np.frombuffer(body, dtype=[("position_m", "<f4", 3), ("colour", "u1", 3)])
    assert f"element vertex {len(points)}\n".encode() in header
    return points["position_m"].astype(float), points["colour"].astype(float)


def matrix_of(row):
    return np.array([[float(row[f"r{i}{j}"]) for j in range(3)] for i in range(3)])


def test_scores_the_four_ways_in_both_ranges_of_tilt(finished):
    up = RenderedRooms(test_rooms=6, height=32, tilt="cone:40").rooms("test").up
    tilt_deg = np.degrees(np.arccos(up[:, 2].astype(float)))
    images = {"small": (tilt_deg < 20).sum(), "10 to 40 degrees": (tilt_deg > 10).sum()}
    assert min(images.values()) >= 1, "choose more rooms"
    rows = table(finished / "evaluation.csv")
    ways = ["direct", "levelled", "levelled, true up", "seen level"]
    assert [(row["tilt"], row["way"]) for row in rows] == [(tilt, way) for tilt in images for way in ways]
    for row in rows:
        assert int(row["images"]) == images[row["tilt"]]
        direct, level = (
            next(float(other["abs_rel"]) for other in rows if (other["tilt"], other["way"]) == (row["tilt"], way))
            for way in ("direct", "seen level")
        )
        recovered = 100 * (direct - float(row["abs_rel"])) / (direct - level)
        assert float(row["recovered_percent"]) == pytest.approx(recovered, abs=0.051)


def test_everything_of_a_photograph_is_in_the_level_frame(finished):
    row = table(finished / "levelled.csv")[0]
    assert (row["name"], row["became"]) == ("attic", "levelled")
    rotation = matrix_of(row)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-5)
    assert rotation[2, 2] == pytest.approx(np.cos(np.radians(float(row["tilt_deg"]))), abs=2e-4)
    assert float(row["tilt_deg"]) > 5, "too small to tell a rotation from none"
    position, colour = cloud(finished / "photographs" / "attic_points.ply")
    seen_in = (colour - 127.5) / 100
    ray = position / np.linalg.norm(position, axis=1, keepdims=True)
    np.testing.assert_allclose(ray, seen_in @ rotation.T, atol=0.015)
    level = np.asarray(Image.open(finished / "photographs" / "attic_level.png"))
    np.testing.assert_array_equal(level.reshape(-1, 3), colour)
    depth_mm = np.asarray(Image.open(finished / "photographs" / "attic_depth.png")).astype(float)
    np.testing.assert_allclose(np.linalg.norm(position, axis=1), depth_mm.ravel() / 1000, atol=6e-4)


def test_a_photograph_without_a_cue_stays_as_it_is_and_its_row_says_so(finished):
    row = table(finished / "levelled.csv")[1]
    assert (row["name"], row["became"], row["tilt_deg"]) == ("grey", "left as it was: no cue of up", "0.0")
    np.testing.assert_array_equal(matrix_of(row), np.eye(3))
    assert set(np.asarray(Image.open(finished / "photographs" / "grey_level.png")).ravel()) == {90}
    assert len(cloud(finished / "photographs" / "grey_points.ply")[0]) == 8192
    report = (finished / "report.html").read_text()
    assert "levelling recovers" in report
    assert "grey: left as it was: no cue of up" in report


def test_what_is_left_for_inference_holds_networks_alone(finished):
    for name in ("upright.ckpt", "depth.ckpt"):
        assert {key.split(".")[0] for key in torch.load(finished / name, weights_only=True)["state_dict"]} == {"network"}


@pytest.mark.timeout(200)
def test_killed_between_the_phases_it_goes_on_with_the_second(finished, ranks, tmp_path):
    words = ["run", "level_then_depth", "--runs-dir", str(tmp_path), *SMALL, *SURE]
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


def test_a_model_that_is_unsure_leaves_photographs_and_rooms_as_they_are(finished, ranks, tmp_path):
    checkpoint = torch.load(finished / "upright.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["max_expected_error_deg"] = 1.0
    torch.save(checkpoint, tmp_path / "unsure.ckpt")
    Image.fromarray(attic()).save(tmp_path / "attic.png")
    given = ["--upright_ckpt", str(tmp_path / "unsure.ckpt"), "--depth_ckpt", str(finished / "depth.ckpt")]
    sizes = ["--data.height", "32", "--data.test_rooms", "6", "--wandb", "disabled"]
    words = ["run", "level_then_depth", "--runs-dir", str(tmp_path), *given, *sizes, "--image", str(tmp_path / "attic.png")]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    run = run_of(tmp_path)
    (row,) = table(run / "levelled.csv")
    assert row["became"] == "left as it was: no cue of up"
    np.testing.assert_array_equal(matrix_of(row), np.eye(3))
    np.testing.assert_array_equal(np.asarray(Image.open(run / "photographs" / "attic_level.png")), attic())
    direct, levelled, *_ = table(run / "evaluation.csv")
    # But for the image, which is halved from one of twice the size.
    assert float(levelled["abs_rel"]) == pytest.approx(float(direct["abs_rel"]), rel=0.001)


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
    Image.new("RGB", (401, 200)).save(tmp_path / "odd.png")
    given = ["--upright_ckpt", str(finished / "upright.ckpt")]
    cases = [
        (["--image", str(tmp_path / "none.jpg")], "none.jpg"),
        (["--image", str(tmp_path / "odd.png")], "odd.png is 401 pixels wide, and an even number is needed"),
        ([*given, "--upright.widths", "[8,12]"], "--upright.widths cannot act beside --upright_ckpt"),
        ([*given, "--upright_epochs", "2"], "--upright_epochs cannot act beside --upright_ckpt"),
        ([*given, "--upright_data.train_rooms=9"], "--upright_data.train_rooms cannot act beside --upright_ckpt"),
        (["--depth_ckpt", str(finished / "depth.ckpt"), "--data.height", "64"], "give --data.height 32"),
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
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()], "something was written"
