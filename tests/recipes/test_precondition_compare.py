"""The recipe as a user runs it, in processes of its own: what it leaves, how it goes on, what it refuses."""

import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lightning_plugins._lightning import Trainer
from lightning_plugins._support.errors import InputError
from lightning_plugins.recipes.comparison_fit import Contestant, run_trial
from lightning_plugins.recipes.comparison_trials import CONTESTANTS, Trial
from tests.recipes.small_recipe import lightning

pytestmark = pytest.mark.adapter

WORDS = ["run", "precondition_compare", "--wandb", "disabled", "--trainer.accelerator", "cpu"]
SHORT = ["--steps", "7", "--trials", "2", "--evaluate_every", "3"]
FEW = ["--methods", "[soap,kbfgs,sgd,kfac,adamw]"]


def only_run(folder):
    (run,) = (folder / "precondition_compare").iterdir()
    return run


def table(run, name):
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(ranks, tmp_path_factory):
    """A short run of some methods that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    assert ranks.run(lightning, 1, *WORDS, "--runs-dir", str(folder), *SHORT, *FEW, timeout_s=120) == [0]
    return only_run(folder)


def test_it_leaves_a_line_for_every_method_and_a_point_for_every_evaluation(compared):
    rows = {row["method"]: row for row in table(compared, "evaluation.csv")}
    assert list(rows) == ["adamw", "soap", "kbfgs", "sgd", "kfac"]
    assert rows["kfac"]["damping"]
    assert not rows["soap"]["damping"]
    assert {row["trials"] for row in rows.values()} == {"2"}
    assert rows["adamw"]["steps_to_adamw"] == "7"
    points = table(compared, "metrics.csv")
    assert len(points) == 5 * 2 * 4
    for method, row in rows.items():
        best = [point for point in points if (point["method"], point["best"]) == (method, "True")]
        assert [int(point["step"]) for point in best] == [0, 3, 6, 7]
        assert best[-1]["loss"] == row["final_loss"]
        seconds = [float(point["seconds"]) for point in best]
        assert seconds == sorted(seconds)
        assert seconds[0] == 0 < seconds[1]
        finals = [float(point["loss"]) for point in points if (point["method"], point["step"]) == (method, "7")]
        assert float(row["final_loss"]) == min(finals)
        assert method in ("soap", "kbfgs") or float(row["final_loss"]) < float(best[0]["loss"]), "nothing was learnt"
    assert len({point["loss"] for point in points if point["step"] == "0"}) == 1, "they start from different weights"


def test_all_pictures_and_the_report_are_there(compared):
    for name in ("loss_against_steps", "loss_against_seconds", "spectrum"):
        pixels = np.asarray(Image.open(compared / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) >= 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    addresses = []

    class Page(HTMLParser):
        def handle_starttag(self, tag, attributes):
            addresses.extend(value for name, value in attributes if name in ("src", "href"))

    Page().feed((compared / "report.html").read_text())
    assert len(addresses) == 3
    assert all(address.startswith("data:") for address in addresses)
    assert "kbfgs" in (compared / "report.html").read_text()


def test_a_resumed_run_leaves_finished_methods_alone_and_has_the_same_losses(compared, ranks, tmp_path):
    words = [*WORDS, "--runs-dir", str(tmp_path), *SHORT, *FEW]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    run = only_run(tmp_path)
    state = json.loads((run / "run.json").read_text())
    state["finished"] = ["adamw", "soap", "sgd"]
    (run / "run.json").write_text(json.dumps(state))
    kept = {name: (run / "methods" / f"{name}.json").stat().st_mtime_ns for name in state["finished"]}
    for name in ("methods/kfac.json", "methods/kbfgs.json", "evaluation.csv", "report.html"):
        (run / name).unlink()
    assert ranks.run(lightning, 1, "run", "--resume", str(run), timeout_s=120) == [0]
    assert {name: (run / "methods" / f"{name}.json").stat().st_mtime_ns for name in kept} == kept
    assert (run / "report.html").exists()
    ours, theirs = ({row["method"]: row["final_loss"] for row in table(of, "evaluation.csv")} for of in (run, compared))
    assert ours == theirs


def test_every_method_of_the_table_takes_part(ranks, tmp_path):
    words = [*WORDS, "--runs-dir", str(tmp_path), "--steps", "2", "--trials", "1", "--task", "character_transformer"]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    rows = table(only_run(tmp_path), "evaluation.csv")
    assert [row["method"] for row in rows] == list(CONTESTANTS)
    assert len({row["final_loss"] for row in rows}) == len(rows), "two methods did the same"


def refusals(rank, world_size, folder, cases):
    """Run the command line on each case; return exit codes and what was printed."""
    import contextlib
    import io

    from lightning_plugins.cli import main

    answers = []
    for words in cases:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            answers.append((main([*WORDS, "--runs-dir", str(folder), *words]), said.getvalue()))
    return answers


def test_bad_input_is_one_sentence_before_anything_is_trained(ranks, tmp_path):
    cases = [
        (["--methods", "[kfak]"], "there is no contestant 'kfak'; did you mean kfac"),
        (["--methods", "[]"], "methods is an empty list"),
        (["--steps", "0"], "steps must be 1 or more, got 0"),
        (["--trials", "0"], "trials must be 1 or more, got 0"),
        (["--evaluate_every", "-5"], "evaluate_every must be 1 or more, got -5"),
        (["--task", "deep_autoencode"], "did you mean deep_autoencoder"),
        (["--seed_everything", "false"], "seed_everything must be a number"),
        (["--trainer.max_steps", "5"], "trainer.max_steps cannot act, got 5"),
        (["--trainer.max_epochs", "5"], "trainer.max_epochs cannot act, got 5"),
        (["--trainer.logger", "false"], "trainer.logger cannot act, got False"),
        (["--step", "5"], "--steps"),
    ]
    ((*answers,),) = ranks.run(refusals, 1, tmp_path, [words for words, _ in cases], timeout_s=120)
    for (words, sentence), (code, said) in zip(cases, answers, strict=True):
        assert code == 2, (words, said)
        lines = [line for line in said.splitlines() if line.startswith("lightning: ")]
        assert len(lines) == 1, (words, said)
        assert sentence in lines[0], (words, lines[0])
        assert "Traceback" not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "something was written"


def test_a_trial_that_diverges_ends_early():
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    steps = []
    record = run_trial(
        lambda callbacks: Trainer(accelerator="cpu", max_steps=30, max_epochs=-1, callbacks=callbacks, **settings),
        Contestant("deep_autoencoder", 0, Trial("sgd", 1e6)),
        every=1,
        advance=lambda: steps.append(1),
    )
    assert record.diverged
    assert record.final == float("inf")
    assert len(steps) < 30
    assert record.first_at(0.0) is None


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="there is no task 'deep'"):
        Contestant("deep", 0, Trial("sgd", 0.1))
