"""The recipe panoramic_depth at its smallest: its options, what a rank does with them, and what is read from a run."""

import csv

import torch

# The smallest run that has everything: three epochs of each phase, on the smallest backbone.
DATA = [
    *("--data.train_rooms", "16", "--data.val_rooms", "1", "--data.test_rooms", "5"),
    *("--data.height", "32", "--data.batch_size", "4", "--wandb", "disabled"),
]
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
