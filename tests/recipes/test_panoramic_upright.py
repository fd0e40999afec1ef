"""The recipe as a user runs it, in processes of its own: what it leaves of photographs and of a killed run, what it refuses."""

import contextlib
import csv
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks.client import kill_times
from tests.recipes.programs import wait_for

pytestmark = pytest.mark.adapter

DATA = [
    *("--data.train_rooms", "16", "--data.val_rooms", "2", "--data.test_rooms", "3"),
    *("--data.height", "32", "--data.batch_size", "4", "--wandb", "disabled"),
]
SMALL = ["--model.widths", "[8,12]", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", *DATA]
COLUMNS = ["predictor", "tilt", *(f"within_{limit}_deg" for limit in (1, 2, 3, 5, 12)), "mean_deg", "images"]
LOSS = "panoramic_upright/train_orientation_loss"


def lightning(rank, world_size, *words):
    """What one process of the command line does; returns its exit code."""
    from lightning_plugins.cli import main

    return main(list(words))


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run):
    return [row[LOSS] for row in table(run / "metrics.csv") if row[LOSS]]


def run_of(folder):
    (run,) = (folder / "panoramic_upright").iterdir()
    return run


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A photograph with a heading in its tags, and a grey sky."""
    folder = tmp_path_factory.mktemp("photographs")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" GPano:PoseHeadingDegrees="90"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    Image.fromarray(pixels).save(folder / "attic.jpg", quality=95, xmp=xmp.encode())
    Image.new("RGB", (128, 64), (120, 120, 120)).save(folder / "fog.png")
    return folder


@pytest.fixture(scope="module")
def finished(ranks, photographs, tmp_path_factory):
    """A run that nothing disturbed. Whatever the estimate expects of itself after so little training counts as sure."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*SMALL, "--model.max_expected_error_deg", "89", "--image", str(photographs)]
    assert ranks.run(lightning, 1, "run", "panoramic_upright", "--runs-dir", str(folder), *words, timeout_s=120) == [0]
    return run_of(folder)


def test_leaves_what_the_card_promises(finished, photographs):
    rows = table(finished / "evaluation.csv")
    assert list(rows[0]) == COLUMNS
    assert [(row["predictor"], row["tilt"]) for row in rows] == [
        (predictor, tilt) for tilt in ("small", "sphere") for predictor in ("network", "lines", "identity")
    ]
    assert {row["images"] for row in rows} == {"3"}
    assert len(losses(finished)) == 12
    levelled = {row["name"]: row for row in table(finished / "levelled.csv")}
    assert levelled["fog"]["became"] == "left alone: no cue of up"
    assert not (finished / "photographs" / "fog.png").exists()
    for name in levelled:
        assert (finished / "photographs" / "previews" / f"{name}.png").stat().st_size > 1000
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") >= 5
    assert "before and after" in page


@pytest.fixture(scope="module")
def sure(finished, tmp_path_factory):
    """The same network, sure of what it has hardly learned."""
    content = torch.load(finished / "upright.ckpt", weights_only=True)
    content["state_dict"]["network.orientation.votes.weight"] *= 1e4
    path = tmp_path_factory.mktemp("sure") / "upright.ckpt"
    torch.save(content, path)
    return path


def test_a_photograph_is_turned_as_its_row_says_and_not_touched_itself(sure, photographs, ranks, tmp_path):
    before = (photographs / "attic.jpg").read_bytes()
    words = ["--ckpt", str(sure), "--image", str(photographs), *DATA]
    assert ranks.run(lightning, 1, "run", "panoramic_upright", "--runs-dir", str(tmp_path), *words, timeout_s=120) == [0]
    run = run_of(tmp_path)
    assert not (run / "checkpoints").exists()
    assert (photographs / "attic.jpg").read_bytes() == before
    row = table(run / "levelled.csv")[0]
    assert row["became"] == "levelled"
    matrix = np.array([[float(row[f"r{i}{j}"]) for j in range(3)] for i in range(3)])
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
    assert np.degrees(np.arccos(matrix[2, 2])) == pytest.approx(float(row["tilt_deg"]), abs=0.01)
    assert float(row["heading_after_deg"]) == pytest.approx((90 - float(row["yaw_deg"])) % 360, abs=1e-3)
    copy = run / "photographs" / "attic.jpg"
    assert Image.open(copy).size == (128, 64)
    assert np.abs(np.asarray(Image.open(copy), float) - np.asarray(Image.open(photographs / "attic.jpg"), float)).mean() > 5


def test_tags_alone_keep_every_pixel(sure, photographs, ranks, tmp_path):
    words = ["--ckpt", str(sure), "--image", str(photographs / "attic.jpg"), "--tags-only", *DATA]
    assert ranks.run(lightning, 1, "run", "panoramic_upright", "--runs-dir", str(tmp_path), *words, timeout_s=120) == [0]
    run = run_of(tmp_path)
    (row,) = table(run / "levelled.csv")
    assert row["became"] == "tags changed"
    copy = run / "photographs" / "attic.jpg"
    np.testing.assert_array_equal(np.asarray(Image.open(copy)), np.asarray(Image.open(photographs / "attic.jpg")))
    (pitch,) = re.findall(rb"PosePitchDegrees\W+([-.0-9]+)", copy.read_bytes())
    assert float(pitch) == pytest.approx(float(row["pitch_deg"]), abs=1e-3)


def test_a_video_is_levelled_frame_by_frame(finished, ranks, tmp_path):
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 64, 128, 3), dtype=np.uint8)
    video = cv2.VideoWriter(str(tmp_path / "walk.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (128, 64))
    for frame in pixels:
        video.write(frame)
    video.release()
    words = ["--ckpt", str(finished / "upright.ckpt"), "--video", str(tmp_path / "walk.avi"), *DATA]
    assert ranks.run(lightning, 1, "run", "panoramic_upright", "--runs-dir", str(tmp_path), *words, timeout_s=120) == [0]
    run = run_of(tmp_path)
    assert "walk.avi: 8 frames at 10 a second, of which 0 could not be decoded" in (run / "report.html").read_text()
    opened = cv2.VideoCapture(str(run / "video" / "walk.avi"))
    assert opened.get(cv2.CAP_PROP_FRAME_COUNT) == 8


@pytest.mark.timeout(200)
def test_killed_and_resumed_it_has_the_same_losses(finished, ranks, tmp_path):
    words = ["run", "panoramic_upright", "--runs-dir", str(tmp_path), *SMALL, "--model.max_expected_error_deg", "89"]
    logs = finished / "logs" / "upright-0"
    took_s = (finished / "upright.ckpt").stat().st_mtime - min(path.stat().st_mtime for path in logs.iterdir())
    # Half of the time at most: a run may be faster than the one before.
    _, seconds = next(kill_times(3, world_size=1, within_s=0.5 * took_s))
    with ranks.start(lightning, 1, *words) as handle:
        wait_for(lambda: list(tmp_path.glob("panoramic_upright/*/logs/upright-0")))
        handle.kill_at(0, seconds)
        assert handle.join(30) == [-9]
    run = run_of(tmp_path)
    assert not (run / "upright.ckpt").exists(), "the kill came too late to be in the middle of the training"
    assert ranks.run(lightning, 1, "run", "--resume", str(run), timeout_s=120) == [0]
    assert losses(run) == losses(finished)
    ours, theirs = (torch.load(one / "upright.ckpt", weights_only=True)["state_dict"] for one in (run, finished))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # Without photographs, held-out rooms are shown.
    assert [row["name"] for row in table(run / "levelled.csv")] == ["room_0", "room_1", "room_2"]


def refusals(rank, world_size, folder, cases):
    """Run the command line on each case; return exit codes and what was printed."""
    from lightning_plugins.cli import main

    answers = []
    for words in cases:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            answers.append((main(["run", "panoramic_upright", "--runs-dir", str(folder), *words]), said.getvalue()))
    return answers


def test_bad_input_is_one_sentence_before_anything_is_trained(finished, ranks, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "square.png")
    (tmp_path / "torn.mp4").write_bytes(b"no video")
    Image.new("RGB", (1025, 512)).save(tmp_path / "odd.png")
    Image.new("RGB", (128, 64)).save(tmp_path / "room.tif")
    cases = [
        (["--image", str(tmp_path / "none.jpg")], "none.jpg"),
        (["--image", str(tmp_path / "square.png")], "64 x 64"),
        (["--video", str(tmp_path / "none.mp4")], "none.mp4 does not exist"),
        (["--video", str(tmp_path / "torn.mp4")], "torn.mp4"),
        (["--image", str(tmp_path / "odd.png")], "1025 pixels wide, and an even number is needed"),
        (["--image", str(tmp_path / "room.tif"), "--tags-only"], "cannot be changed without encoding its pixels anew"),
        (["--tags-only"], "tags_only cannot act without photographs"),
        (["--ckpt", str(tmp_path / "none.ckpt")], "does not exist"),
        (["--ckpt", str(finished / "upright.ckpt"), "--model.blocks", "3"], "--model.blocks cannot act beside --ckpt"),
        (["--data.tilt", "steep"], "there are no tilts 'steep'"),
        (["--data.tilt", "null"], "data.tilt must name tilts"),
        (["--model.reconstruct", "true"], "data.with_level is off"),
        (["--model.reconstruct", "true", "--data.with_level", "true"], "give --trainer.gradient_clip_val null"),
        (["--data.height", "50"], "height must be a multiple of 32"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs must be 1 or more, got 0"),
        (["--trainer.max_steps", "0"], "trainer.max_steps must be 1 or more, got 0"),
        (["--trainer.logger", "false"], "trainer.logger cannot act, got False"),
    ]
    (answers,) = ranks.run(refusals, 1, str(tmp_path / "runs"), [words for words, _ in cases], timeout_s=120)
    for (words, expected), (code, said) in zip(cases, answers, strict=True):
        assert code == 2, words
        assert expected in said, (words, said)
        assert len([line for line in said.splitlines() if line.startswith("error")]) <= 1
    assert not list(tmp_path.rglob("*.part"))
