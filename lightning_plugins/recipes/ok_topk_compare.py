"""The recipe ``ok_topk_compare``: two small nets on several processes, trained densely, with Ok-Topk and with PowerSGD.

All have the same weights at the start, batches and learning rates; only how gradients are reduced differs. Each is a fit of its
own under a Lightning Trainer. What is finished stays so: ``--resume`` goes on with the first unfinished one. The first process
alone writes. The knobs are in ``ok_topk_compare.yaml``.
"""

from typing import Any

from tqdm.auto import tqdm

from lightning_plugins._lightning import Trainer
from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.communication_contestants import CONTESTANTS, make_strategy
from lightning_plugins.recipes.communication_fit import Learner, Point, read_record, train_measured, write_record
from lightning_plugins.recipes.ok_topk_compare_options import CLI
from lightning_plugins.recipes.run_loggers import RunLoggers
from lightning_plugins.recipes.turns import waiting_for_first
from lightning_plugins.reporting.comparison import draw_panels
from lightning_plugins.reporting.report import Figure, Table, Text, write_report
from lightning_plugins.reporting.tables import write_table

Records = dict[str, dict[str, list[Point]]]  # by task and contestant

# What losses are drawn against: field of a point, name of the axis, whether it is logarithmic.
AXES = [
    ("step", "optimizer steps", False),
    ("seconds", "seconds of training steps", False),
    ("sent_mb", "MB sent by a process", True),
]
# What dozens of Trainers would write or print.
OFF = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def main(options: list[str], run: RunFolder, resume: bool) -> None:
    """Train what is not trained yet; compare, draw, report."""
    cli = CLI(run, options)
    cli.check_processes()
    train(cli, run)
    with waiting_for_first(cli.trainer.is_global_zero) as is_first:
        if is_first:
            compare(cli, run)


def train(cli: CLI, run: RunFolder) -> None:
    """Train what is not finished, on all processes at once, with one progress bar."""
    knobs, is_first, ranks = cli.config, cli.trainer.is_global_zero, cli.trainer.world_size
    finished = [name for name in run.read()["finished"] if "/" in name]
    for name in finished:
        if (begun_with := read_record(run, name)["processes"]) != ranks:
            raise InputError(f"this run was begun with {begun_with} processes, got {ranks}; give --nproc-per-node {begun_with}")
    todo = [name for task in cli.tasks for contestant in cli.contestants if (name := f"{task}/{contestant}") not in finished]

    with tqdm(total=len(todo) * knobs.steps, unit="step", disable=not is_first) as bar:
        for name in todo:
            bar.set_description(name)
            task, contestant = name.split("/")
            learner = Learner(task, knobs.seed_everything)

            def make_trainer(callbacks: list[Any], contestant: str = contestant) -> Trainer:
                settings = {**OFF, "max_steps": knobs.steps, "max_epochs": -1}
                settings["strategy"] = make_strategy(contestant, knobs.density)
                return cli.another_trainer(callbacks, "ok_topk_compare", **settings)

            points = train_measured(make_trainer, learner, knobs.evaluate_every, bar.update)
            if is_first:
                write_record(run, name, ranks, points)
                run.finish(name)


def compare(cli: CLI, run: RunFolder) -> None:
    """Write tables, pictures, report and W&B run from what all contestants did."""
    records = {task: {name: read_record(run, f"{task}/{name}")["points"] for name in cli.contestants} for task in cli.tasks}
    rows = [row(cli, task, name, of_task) for task, of_task in records.items() for name in of_task]
    write_table(run.path / "evaluation.csv", rows)
    points = [(task, name, point) for task, of_task in records.items() for name, of in of_task.items() for point in of]
    write_table(run.path / "metrics.csv", [{"task": task, "contestant": name, **of._asdict()} for task, name, of in points])
    pictures = draw(records, run)
    report(cli, run, rows, pictures)
    loggers = RunLoggers(run, cli.config.wandb)
    if loggers.wandb is not None:
        for step in sorted({of.step for *_, of in points}):
            losses = {f"{task}/{name}/loss": of.loss for task, name, of in points if of.step == step}
            loggers.wandb.log_metrics(losses, step)
    loggers.show(rows, pictures, of="losses")


def row(cli: CLI, task: str, name: str, of_task: dict[str, list[Point]]) -> dict[str, Any]:
    """Return a contestant's line: where it ended, and what it took beside the dense one."""
    last, dense = of_task[name][-1], of_task["dense"][-1] if "dense" in of_task else None
    return {
        "task": task,
        "contestant": name,
        "processes": cli.trainer.world_size,
        "steps": last.step,
        "final_loss": last.loss,
        "final_accuracy": last.accuracy,
        "loss_above_dense": None if dense is None else last.loss - dense.loss,
        "sent_mb": last.sent_mb,
        "sent_over_dense": None if dense is None else last.sent_mb / dense.sent_mb,
        "seconds": last.seconds,
        "ms_per_step": 1e3 * last.seconds / last.step,
        "seconds_over_dense": None if dense is None else last.seconds / dense.seconds,
    }


def draw(records: Records, run: RunFolder) -> dict[str, bytes]:
    """Write the three pictures; return them by caption."""
    pictures = {}
    for field, horizontal, logarithmic in AXES:
        panels = {
            task: {CONTESTANTS[name]: [(getattr(of, field), of.loss) for of in points] for name, points in of_task.items()}
            for task, of_task in records.items()
        }
        picture = draw_panels(panels, horizontal, logarithmic)
        with atomic_write(run.path / f"loss_against_{field}.png") as file:
            file.write(picture)
        pictures[f"Loss against {horizontal}."] = picture
    return pictures


def report(cli: CLI, run: RunFolder, rows: list[dict[str, Any]], pictures: dict[str, bytes]) -> None:
    """Write ``report.html``: what was sent for which loss, the table, the pictures."""
    knobs = cli.config
    lines = [
        f"{cli.trainer.world_size} processes, {knobs.steps} steps, Ok-Topk's density {knobs.density:g}, one seed "
        f"({knobs.seed_everything}). Everybody has the same weights at the start, batches and learning rate."
    ]
    for of in rows:
        if of["sent_over_dense"] is not None and of["contestant"] != "dense":
            lines.append(
                f"{of['task']}: {CONTESTANTS[of['contestant']]} sends {100 * of['sent_over_dense']:.1f} % of what dense training "
                f"does, and ends at {of['final_loss']:.3g}, dense at {of['final_loss'] - of['loss_above_dense']:.3g}."
            )
    lines.append(
        "Seconds are those of training steps alone. These processes send to each other through one machine's memory, where bytes "
        "cost next to nothing: between machines, fewer bytes save more."
    )
    caption = "Losses and accuracies on the evaluation set; MB sent in gradients by the process that sent most."
    figures = [Figure(picture, caption) for caption, picture in pictures.items()]
    write_report(
        run.path / "report.html", "Reductions of gradients compared", [Text(lines), Table(rows, caption=caption), *figures]
    )
