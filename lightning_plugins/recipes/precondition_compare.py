"""The recipe ``precondition_compare``: AdamW, SGD and every method on one small task, with as many trials each.

Each trial is a fit of its own under a Lightning Trainer, with the callback ``Preconditioner`` on SGD. A method is finished when
all its trials are; ``--resume`` goes on with the first unfinished one. Of every method the trial with the lowest last loss is
drawn, and timed to the loss that AdamW ended with. The knobs are in ``precondition_compare.yaml``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lightning_plugins._lightning import Trainer
from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.engines.preconditioning.analysis import CurvatureOperator, spectral_density
from lightning_plugins.recipes.comparison_fit import Contestant, Record, run_trial
from lightning_plugins.recipes.comparison_tasks import TASKS
from lightning_plugins.recipes.comparison_trials import Trial
from lightning_plugins.recipes.precondition_compare_options import CLI
from lightning_plugins.recipes.run_loggers import RunLoggers
from lightning_plugins.reporting.comparison import draw_losses
from lightning_plugins.reporting.report import Figure, Table, Text, write_report
from lightning_plugins.reporting.spectra import spectrum
from lightning_plugins.reporting.tables import write_table

RIVAL = "adamw"


def main(options: list[str], run: RunFolder, resume: bool) -> None:
    """Run the trials that are missing; compare, draw, report."""
    cli = CLI(run, options)
    loggers = RunLoggers(run, cli.config.wandb)
    train(cli, run)
    records = {method: read_records(run, method) for method in cli.grids}
    best = {method: min(of_method, key=lambda record: record.final) for method, of_method in records.items()}
    target = best[RIVAL].final if RIVAL in best else None
    rows = [row(record, target, len(records[method]), cli.config.steps) for method, record in best.items()]
    write_table(run.path / "evaluation.csv", rows)
    write_table(run.path / "metrics.csv", [point for method in records for point in points(records[method], best[method])])
    pictures = draw(best, target, run.path) | draw_spectrum(cli.config.task, cli.config.seed_everything, run.path)
    report(run, cli, rows, pictures)
    log(loggers, best)
    loggers.show(rows, pictures, of="losses")


def train(cli: CLI, run: RunFolder) -> None:
    """Run all trials of the methods that are not finished, with one progress bar."""
    knobs, finished = cli.config, run.read()["finished"]
    todo = [method for method in cli.grids if method not in finished]

    def make_trainer(callbacks: list[Any]) -> Trainer:
        off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        return cli.another_trainer(callbacks, "precondition_compare", max_steps=knobs.steps, max_epochs=-1, **off)

    with tqdm(total=sum(len(cli.grids[method]) for method in todo) * knobs.steps, unit="step") as bar:
        for method in todo:
            bar.set_description(method)
            records = []
            for trial in cli.grids[method]:
                contestant = Contestant(knobs.task, knobs.seed_everything, trial)
                records.append(run_trial(make_trainer, contestant, knobs.evaluate_every, bar.update))
                bar.update(knobs.steps - records[-1].points[-1][0])  # what a trial that diverged leaves out
            write_records(run, method, records)
            run.finish(method)


def write_records(run: RunFolder, method: str, records: list[Record]) -> None:
    """Keep what the trials of a method did, for a run that goes on later."""
    (run.path / "methods").mkdir(exist_ok=True)
    kept = [{"setting": vars(record.trial), "points": record.points, "diverged": record.diverged} for record in records]
    with atomic_write(run.path / "methods" / f"{method}.json", "w") as file:
        json.dump(kept, file)


def read_records(run: RunFolder, method: str) -> list[Record]:
    """Read what `write_records` wrote."""
    kept = json.loads((run.path / "methods" / f"{method}.json").read_text(encoding="utf-8"))
    return [Record(Trial(**of["setting"]), [tuple(point) for point in of["points"]], of["diverged"]) for of in kept]


def row(record: Record, target: float | None, trials: int, steps: int) -> dict[str, Any]:
    """Return a method's line: its best setting, where it ended, and when it was where AdamW ended."""
    reached = None if target is None else record.first_at(target)
    step, seconds, loss = record.points[-1]
    return {
        **record.trial.row(),
        "trials": trials,
        "final_loss": loss,
        "diverged": record.diverged,
        "steps_to_adamw": None if reached is None else reached[0],
        "share_of_steps": None if reached is None else reached[0] / steps,
        "seconds_to_adamw": None if reached is None else reached[1],
        "seconds": seconds,
        "ms_per_step": 1e3 * seconds / step,
    }


def points(records: list[Record], best: Record) -> list[dict[str, Any]]:
    """Return a row for each evaluation of each trial."""
    return [
        {**record.trial.row(), "best": record is best, "step": step, "seconds": seconds, "loss": loss}
        for record in records
        for step, seconds, loss in record.points
    ]


def draw(best: dict[str, Record], target: float | None, folder: Path) -> dict[str, bytes]:
    """Write both pictures; return them by caption."""
    pictures = {}
    for axis, name, horizontal in ((0, "steps", "optimizer steps"), (1, "seconds", "seconds of training steps")):
        curves = {method: [(point[axis], point[2]) for point in record.points] for method, record in best.items()}
        picture = draw_losses(curves, horizontal, target, "where AdamW ends")
        with atomic_write(folder / f"loss_against_{name}.png") as file:
            file.write(picture)
        pictures[f"Loss against {name}, of every method's best trial."] = picture
    return pictures


def draw_spectrum(task_name: str, seed: int, folder: Path) -> dict[str, bytes]:
    """Draw the curvature of the first batch where all trials start: what damping is small or large against."""
    task = TASKS[task_name](seed)
    of_task = (task.make_module(), task.loss, [task.batch(0)])
    operators = {
        "Hessian": CurvatureOperator(*of_task, "hessian"),
        "Gauss-Newton": CurvatureOperator(*of_task, "gauss_newton"),
    }
    densities = {
        name: spectral_density(operator, probes=1, steps=24, generator=torch.Generator().manual_seed(seed))
        for name, operator in operators.items()
    }
    grid = densities["Hessian"].grid()
    picture = spectrum(grid, {name: density.density(grid) for name, density in densities.items()})
    with atomic_write(folder / "spectrum.png") as file:
        file.write(picture)
    return {"Eigenvalues of the loss's curvature where all trials start.": picture}


def report(run: RunFolder, cli: CLI, rows: list[dict[str, Any]], pictures: dict[str, bytes]) -> None:
    """Write ``report.html``: what was fastest, the table, both pictures."""
    knobs = cli.config
    reached = [of for of in rows if of["steps_to_adamw"] and of["method"] != RIVAL]
    summary = f"Task {knobs.task}, {knobs.steps} steps, {knobs.trials} trials of every method, seed {knobs.seed_everything}."
    if reached:
        first = min(reached, key=lambda of: of["steps_to_adamw"])
        summary += f" {first['method']} is first at the loss that AdamW ends with, after {first['steps_to_adamw']} steps"
        first = min(reached, key=lambda of: of["seconds_to_adamw"])
        summary += f"; in seconds {first['method']}, after {first['seconds_to_adamw']:.2f} s."
    ranked = sorted(rows, key=lambda of: (of["diverged"], of["final_loss"]))
    caption = "Settings and results of every method's best trial; seconds are those of training steps alone."
    figures = [Figure(picture, caption) for caption, picture in pictures.items()]
    write_report(run.path / "report.html", "Optimizers compared", [Text([summary]), Table(ranked, caption=caption), *figures])


def log(loggers: RunLoggers, best: dict[str, Record]) -> None:
    """Put the best trials' losses into the W&B run, each method under its own name."""
    if loggers.wandb is None:
        return
    for step in sorted({point[0] for record in best.values() for point in record.points}):
        losses = {f"{method}/loss": loss for method, of in best.items() for at, _, loss in of.points if at == step}
        loggers.wandb.log_metrics(losses, step)
