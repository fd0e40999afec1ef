"""How many steps, and seconds, every method needs to the loss that AdamW ends with, on two small tasks.

Claim: on the deep autoencoder K-FAC, EK-FAC, SOAP, Shampoo and PSGD need at most 0.55 of AdamW's steps, and on the character
transformer SOAP and one Kronecker-factored method at most 0.8, for each of three seeds. Every contestant gets as many trials,
on seed 0; the best setting then runs on all seeds. Rates are constant, AdamW has its default betas and no weight decay. Trials
of AdamW run to the end, those of the others for 0.55 of the steps, and end at AdamW's loss, or when they diverge. What takes
longer than a limit, which AdamW has not, is ended: out of time. Seconds are those of the training steps alone, with one thread
and two runs at a time. Options that are not tried, and the middles of the grids, are
in ``lightning_plugins/recipes/comparison_trials.py``.

Run: python benchmarks/preconditioning_convergence.py [--tasks ...] [--methods ...] [--seeds N] [--steps N] [--trials N]
Writes: benchmarks/results/preconditioning_convergence.csv, and all trials to preconditioning_convergence_grid.csv.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from typing import Any

import torch
from _results import write_results
from tqdm import tqdm

from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.recipes.comparison_tasks import TASKS
from lightning_plugins.recipes.comparison_trials import CONTESTANTS, FIRST_ORDER, Trial, at_edge, trials

EVALUATE_EVERY = 5
DIVERGED = 10.0  # times the loss before the first step
TRIAL_STEPS = 0.55  # of AdamW's, in the trials of the others
FINAL_TIME = 1.5  # times the limit of a trial
GATES = {
    "deep_autoencoder": (0.55, [["kfac"], ["ekfac"], ["soap"], ["shampoo"], ["psgd"]]),
    "character_transformer": (0.8, [["soap"], ["kfac", "ekfac", "foof", "kbfgs", "shampoo", "psgd"]]),
}


@dataclass(frozen=True)
class Job:
    """A training run of so many steps, until ``target`` is reached, if one is given, or ``limit_s`` seconds are spent."""

    task: str
    trial: Trial
    seed: int
    steps: int
    target: float = -math.inf
    limit_s: float = math.inf


@dataclass(frozen=True)
class Outcome:
    """What a run did: its losses on the evaluation set and the seconds of training, by step; and why it ended early."""

    job: Job
    losses: dict[int, float]
    seconds: dict[int, float]
    ended: str

    @property
    def final(self) -> float:
        """Return the last loss."""
        return self.losses[max(self.losses)]

    def steps_to(self, target: float) -> int | None:
        """Return the first evaluated step with a loss of ``target`` or less."""
        return next((step for step, loss in self.losses.items() if loss <= target), None)


def run(job: Job) -> Outcome:
    """Train in a plain loop."""
    task = TASKS[job.task](job.seed)
    module = task.make_module()
    optimizer = job.trial.make_optimizer(module)
    method = job.trial.method
    preconditioner = None if method in FIRST_ORDER else GradientPreconditioner(module, method, **job.trial.options())

    def evaluate() -> float:
        with torch.no_grad():
            return float(task.loss(module(task.evaluation[0]), task.evaluation[1]))

    losses, seconds, spent_s, ended = {0: evaluate()}, {0: 0.0}, 0.0, ""
    for step in range(1, job.steps + 1):
        inputs, targets = task.batch(step - 1)
        start_s = time.perf_counter()
        loss = task.loss(module(inputs), targets)
        if preconditioner is not None:
            preconditioner.observe(loss)
        optimizer.zero_grad()
        loss.backward()
        if preconditioner is not None:
            preconditioner.precondition(optimizer)
        optimizer.step()
        if preconditioner is not None:
            preconditioner.replay(lambda inputs=inputs, targets=targets: task.loss(module(inputs), targets))
        spent_s += time.perf_counter() - start_s
        if step % EVALUATE_EVERY and step != job.steps:
            continue
        losses[step], seconds[step] = evaluate(), spent_s
        if not losses[step] <= DIVERGED * losses[0]:
            ended = "diverged"
        elif losses[step] <= job.target:
            ended = "reached the target"
        elif spent_s > job.limit_s:
            ended = "out of time"
        if ended:
            break
    return Outcome(job, losses, seconds, ended)


def rank(outcome: Outcome, target: float) -> tuple[float, bool, float]:
    """Return what the best trial has least of: steps to the target, else loss at the end."""
    steps = outcome.steps_to(target)
    final = outcome.final if math.isfinite(outcome.final) else math.inf
    return (math.inf if steps is None else steps, outcome.ended == "diverged", final)


def all_outcomes(pool: Pool, jobs: Sequence[Job], words: str) -> list[Outcome]:
    """Run jobs two at a time, and return what they did in the order of the jobs."""
    found = {}
    for outcome in tqdm(pool.imap_unordered(run, jobs), words, len(jobs), unit="run"):
        found[outcome.job] = outcome
    return [found[job] for job in jobs]


def compare(pool: Pool, task: str, given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tune on seed 0 and run the best on all seeds; return the final rows and those of all trials."""
    steps = given.steps or TASKS[task](0).steps
    grids = {method: trials(task, method, given.trials) for method in ("adamw", *given.methods)}
    adamw = all_outcomes(pool, [Job(task, trial, 0, steps) for trial in grids["adamw"]], f"{task}: AdamW's grid")
    best = {"adamw": min(adamw, key=lambda outcome: rank(outcome, -math.inf))}
    if given.trials > 2 and at_edge(best["adamw"].job.trial, grids["adamw"]):
        raise SystemExit(f"AdamW's best lies at the edge of its grid on {task}: {best['adamw'].job.trial}; move the middle")
    target = best["adamw"].final
    short = math.ceil(TRIAL_STEPS * steps)
    jobs = [Job(task, trial, 0, short, target, given.limit) for method in given.methods for trial in grids[method]]
    tried = {method: [] for method in given.methods}
    for outcome in all_outcomes(pool, jobs, f"{task}: the others' grids"):
        tried[outcome.job.trial.method].append(outcome)
    best |= {method: min(outcomes, key=lambda outcome: rank(outcome, target)) for method, outcomes in tried.items()}
    finals = [
        Job(task, outcome.job.trial, seed, steps, limit_s=math.inf if name == "adamw" else FINAL_TIME * given.limit)
        for name, outcome in best.items()
        for seed in range(given.seeds)
    ]
    outcomes = all_outcomes(pool, finals, f"{task}: best settings, {given.seeds} seeds")
    targets = {outcome.job.seed: outcome.final for outcome in outcomes if outcome.job.trial.method == "adamw"}
    grid_rows = [_row(outcome, target, steps, grids) for outcomes in (adamw, *tried.values()) for outcome in outcomes]
    return [_row(outcome, targets[outcome.job.seed], steps, grids) for outcome in outcomes], grid_rows


def _row(outcome: Outcome, target: float, adamw_steps: int, grids: dict[str, list[Trial]]) -> dict[str, Any]:
    job, reached = outcome.job, outcome.steps_to(target)
    last = max(outcome.losses)
    return {
        "task": job.task,
        **job.trial.row(),
        "best_at_edge": at_edge(job.trial, grids[job.trial.method]),
        "seed": job.seed,
        "adamw_final_loss": f"{target:.5g}",
        "adamw_steps": adamw_steps,
        "steps_to_it": reached,
        "ratio": None if reached is None else f"{reached / adamw_steps:.3f}",
        "seconds_to_it": None if reached is None else f"{outcome.seconds[reached]:.2f}",
        "steps": last,
        "loss": f"{outcome.final:.5g}",
        "seconds": f"{outcome.seconds[last]:.2f}",
        "ms_per_step": f"{1e3 * outcome.seconds[last] / last:.2f}",
        "ended": outcome.ended,
    }


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line per gate: held or missed, by the worst seed of the best of its methods."""
    lines = []
    for task, (bound, gates) in GATES.items():
        for methods in gates:
            worst = {
                method: max(float(row["ratio"] or "inf") for row in rows if (row["task"], row["method"]) == (task, method))
                for method in methods
                if any((row["task"], row["method"]) == (task, method) for row in rows)
            }
            if worst:
                method = min(worst, key=lambda name: worst[name])
                held = "held" if worst[method] <= bound else "MISSED"
                lines.append(f"{held}: {task}, {' or '.join(methods)}: {method} {worst[method]:.3f} of AdamW's steps, <= {bound}")
    return lines


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the task's own")
    parser.add_argument("--trials", type=int, default=7, help="of every contestant")
    parser.add_argument(
        "--limit", type=float, default=16.0, help="seconds of training in a trial, and two thirds of a final run's"
    )
    given = parser.parse_args()
    given.methods = [method for method in given.methods if method != "adamw"]
    start_s = time.perf_counter()
    rows, grid_rows = [], []
    with get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        for task in given.tasks:
            final, tried = compare(pool, task, given)
            rows += final
            grid_rows += tried
            for row in final:
                print({name: value for name, value in row.items() if value not in (None, "")})
    print("\n".join(verdicts(rows)))
    print(write_results("preconditioning_convergence", rows))
    print(write_results("preconditioning_convergence_grid", grid_rows))
    print(f"all of it took {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
