"""The recipe as a user runs it, on two processes that it starts itself: what it leaves, how it goes on, what it refuses."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_plugins._support.errors import InputError
from lightning_plugins.recipes.communication_contestants import CONTESTANTS, all_reduce_bytes, make_strategy
from lightning_plugins.recipes.communication_fit import Learner
from lightning_plugins.recipes.communication_tasks import TASKS, share
from tests.recipes.programs import lightning, only_run

pytestmark = pytest.mark.adapter

SHORT = (
    "run",
    "ok_topk_compare",
    "--tasks",
    "[character_transformer]",
    "--steps",
    "5",
    "--evaluate_every",
    "2",
    "--wandb",
    "disabled",
)


def table(run, name):
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A short run of all contestants that nothing disturbed."""
    folder = tmp_path_factory.mktemp("compared")
    done = lightning(folder, *SHORT)
    assert done.returncode == 0, done.stderr
    return folder, only_run(folder, "ok_topk_compare")


def test_it_leaves_a_line_for_every_contestant_and_what_each_has_sent(compared):
    rows = {row["contestant"]: row for row in table(compared[1], "evaluation.csv")}
    assert list(rows) == list(CONTESTANTS)
    assert {row["processes"] for row in rows.values()} == {"2"}
    elements = sum(parameter.numel() for parameter in Learner("character_transformer", 0).parameters())
    assert float(rows["dense"]["sent_mb"]) == pytest.approx(5 * 4e-6 * elements), "of two processes each sends its gradient once"
    for name in ("ok_topk", "ok_topk_bfloat16", "powersgd"):
        assert 0 < float(rows[name]["sent_over_dense"]) < 0.7, name
    assert float(rows["ok_topk_bfloat16"]["sent_mb"]) < float(rows["ok_topk"]["sent_mb"])
    points = table(compared[1], "metrics.csv")
    assert [int(point["step"]) for point in points] == [0, 2, 4, 5] * len(rows)
    starts = {point["loss"] for point in points if point["step"] == "0"}
    assert len(starts) == 1, "they start from different weights"
    assert all(float(row["final_loss"]) < float(next(iter(starts))) for row in rows.values()), "nothing was learnt"


def test_all_pictures_and_the_report_are_there(compared):
    for name in ("step", "seconds", "sent_mb"):
        pixels = np.asarray(Image.open(compared[1] / f"loss_against_{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) >= 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    report = (compared[1] / "report.html").read_text()
    assert report.count("data:image/png") == 3
    assert "Ok-Topk, bfloat16" in report


def test_a_resumed_run_leaves_finished_contestants_alone_and_has_the_same_losses(compared):
    folder, run = compared
    before = {row["contestant"]: row["final_loss"] for row in table(run, "evaluation.csv")}
    state = json.loads((run / "run.json").read_text())
    state["finished"] = [name for name in state["finished"] if "/" in name and not name.endswith(("/ok_topk", "/powersgd"))]
    (run / "run.json").write_text(json.dumps(state))
    of_task = run / "contestants" / "character_transformer"
    kept = {name: (of_task / f"{name}.json").stat().st_mtime_ns for name in ("dense", "ok_topk_bfloat16")}
    for path in (of_task / "ok_topk.json", of_task / "powersgd.json", run / "evaluation.csv", run / "report.html"):
        path.unlink()
    done = lightning(folder, "run", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert {name: (of_task / f"{name}.json").stat().st_mtime_ns for name in kept} == kept
    assert (run / "report.html").exists()
    assert {row["contestant"]: row["final_loss"] for row in table(run, "evaluation.csv")} == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--contestants", "[dens]"), "there is no 'dens' among the contestants; did you mean dense"),
        (("--nproc-per-node", "1"), "needs 2 to"),
        (("--density", "2"), "density must be in (0, 1], got 2"),
        (("--trainer.strategy", "ddp"), "trainer.strategy cannot act"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_trained(tmp_path, words, sentence):
    done = lightning(tmp_path, *SHORT, *words)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("lightning: ")]
    assert len(lines) == 1, done.stderr
    assert sentence in lines[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("contestants"))


def test_shares_are_disjoint_and_of_the_same_size():
    inputs = torch.arange(11)
    parts = [share((inputs, -inputs), rank, 3)[0].tolist() for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("name", list(TASKS))
def test_tasks_are_the_same_bits_for_the_same_seed_and_can_be_learnt(name):
    first, again, other = Learner(name, 0), Learner(name, 0), Learner(name, 1)
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first.task.batch(3)[0], again.task.batch(3)[0])
    assert not torch.equal(first.task.batch(3)[0], other.task.batch(3)[0])
    batch = first.task.batch(0)
    optimizer = torch.optim.SGD(first.network.parameters(), lr=first.learning_rate, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = first.task.loss(first.network(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_names_are_checked():
    assert all_reduce_bytes(1000, 4) == 1500
    with pytest.raises(InputError, match="no contestant 'oktopk'"):
        make_strategy("oktopk", 0.1)
    with pytest.raises(InputError, match="no task 'cnn'"):
        Learner("cnn", 0)
