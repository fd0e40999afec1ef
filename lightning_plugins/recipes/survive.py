"""The recipe ``survive``: a small net trained in two processes twice, once left alone, once with a process killed three times.

The killed run goes on from memory each time: `MemoryCheckpoint` keeps the state outside of the processes, and torchrun's agent
starts them again. Both trainings are launched from here, with as many restarts as there are kills; a thread of this process
kills. Then both are compared, bit by bit. ``--resume`` goes on with the first unfinished training. The knobs are in
``survive.yaml``.
"""

import os
import random
from collections import Counter
from itertools import groupby, pairwise
from typing import Any

from tqdm.auto import tqdm

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.launch_options import run_parser, torchrun_options
from lightning_plugins.recipes.launching import run_function
from lightning_plugins.recipes.quiet import quiet
from lightning_plugins.recipes.run_loggers import RunLoggers
from lightning_plugins.recipes.survive_journal import Attempt, Kill, Step, new_launch, read_attempts, read_kills, that_count
from lightning_plugins.recipes.survive_kills import Watch, drawn_delays_s
from lightning_plugins.recipes.survive_learner import STEPS_PER_EPOCH
from lightning_plugins.recipes.survive_options import CLI, refuse_launched
from lightning_plugins.recipes.survive_training import KILLED, UNDISTURBED
from lightning_plugins.recipes.targets import Target
from lightning_plugins.reporting.report import Figure, Table, Text, write_report
from lightning_plugins.reporting.survival import Death, draw_losses, draw_progress
from lightning_plugins.reporting.tables import write_table

_PROCESSES = Target("survive", recipe="lightning_plugins.recipes.survive_training")


def main(options: list[str], run: RunFolder, resume: bool) -> None:
    """Train what is not trained yet; compare, draw, report."""
    refuse_launched(os.environ)
    with quiet():
        cli = CLI(run, options)
    loggers = RunLoggers(run, cli.config.wandb)
    for training in (UNDISTURBED, KILLED):
        if not run.is_finished(training):
            train(cli, run, training, options)
            run.finish(training)
    compare(cli, run, loggers)


def train(cli: CLI, run: RunFolder, training: str, options: list[str]) -> None:
    """Launch the processes of one training, and wait until it has come to its end, through all kills that are left."""
    knobs, folder, generator = cli.config, run.path / training, random.SystemRandom()
    delays_s = []
    if training == KILLED:
        kills = knobs.kills - len(read_kills(folder))  # some may have fallen before this run was stopped and resumed
        steps = last_start(read_attempts(run.path / UNDISTURBED)).longest
        delays_s = drawn_delays_s(kills, steps[-1].seconds - steps[0].seconds, generator)
    words = [f"--nproc-per-node={knobs.processes}", f"--max-restarts={len(delays_s)}"]
    launch = new_launch(folder)
    with tqdm(total=cli.steps, unit="step", desc=training) as bar:

        def advance(step: int) -> None:
            bar.update(step - bar.n)  # back, too, when the run has been thrown back

        with Watch(launch, knobs.processes, cli.steps, delays_s, advance, bar.write, generator):
            run_function(_PROCESSES, options, RunFolder(launch), False, torchrun_options(run_parser().parse_args(words)), False)


def last_start(attempts: list[Attempt]) -> Attempt:
    """Return the start that came to the end; of the training that is left alone each launch begins at the first step."""
    return next(attempt for attempt in reversed(attempts) if attempt.ends)


def compare(cli: CLI, run: RunFolder, loggers: RunLoggers) -> None:
    """Write tables, pictures, report and W&B run from what both trainings did.

    Raises:
        RuntimeError: if the killed run is not the same as the one left alone, after all has been written.
    """
    alone = last_start(read_attempts(run.path / UNDISTURBED))
    attempts, kills = read_attempts(run.path / KILLED), read_kills(run.path / KILLED)
    rows = checks(alone, attempts)
    deaths = kill_rows(attempts, kills)
    write_table(run.path / "evaluation.csv", rows)
    write_table(run.path / "kills.csv", deaths)
    before, after = losses(alone.steps), losses(that_count(attempts))
    write_table(
        run.path / "metrics.csv",
        [{"step": step, f"{UNDISTURBED}_loss": loss, f"{KILLED}_loss": after.get(step)} for step, loss in before.items()],
    )
    pictures = draw(alone, attempts, deaths)
    for name, picture in zip(("loss", "progress"), pictures.values(), strict=True):
        with atomic_write(run.path / f"{name}.png") as file:
            file.write(picture)
    differing = [row["what"] for row in rows if not row["equal"]]
    report(cli, run, rows, deaths, pictures, differing)
    if loggers.wandb is not None:
        for step, loss in before.items():
            loggers.wandb.log_metrics({f"{UNDISTURBED}/loss": loss, f"{KILLED}/loss": after.get(step, float("nan"))}, step)
    loggers.show(rows, pictures, of="survival")
    print(verdict(differing, deaths))
    if differing:
        raise RuntimeError(f"{verdict(differing, deaths)}; see {run.path / 'report.html'}")


def losses(steps: dict[int, list[Step]]) -> dict[int, float]:
    """Return the mean loss of all processes after each step."""
    return {of[0].number: sum(step.loss for step in of) / len(of) for of in zip(*steps.values(), strict=False)}


def checks(alone: Attempt, attempts: list[Attempt]) -> list[dict[str, Any]]:
    """Return what both runs have in common, or have not: a line each."""
    counting, ends = that_count(attempts), last_start(attempts).ends
    everything = [(rank, step) for attempt in attempts for rank, of in attempt.steps.items() for step in of]
    expected = {(rank, step.number): step for rank, of in alone.steps.items() for step in of}
    same = {
        "losses of all steps, also of those done twice": all(
            (rank, step.number) in expected and step.loss == expected[rank, step.number].loss for rank, step in everything
        ),
        "samples of all steps": {rank: [step.samples for step in of] for rank, of in counting.items()}
        == {rank: [step.samples for step in of] for rank, of in alone.steps.items()},
        "every sample seen once in each epoch": all(set(Counter(seen).values()) == {1} for seen in epochs(counting))
        and len({frozenset(seen) for seen in epochs(counting)}) == 1,
    }
    for rank, checksums in sorted(alone.ends.items()):
        for name, checksum in checksums.items():
            same[f"{name} of process {rank} in the end"] = ends.get(rank, {}).get(name) == checksum
    return [{"what": what, "equal": equal} for what, equal in same.items()]


def epochs(steps: dict[int, list[Step]]) -> list[list[int]]:
    """Return the samples that all processes together have seen in each epoch."""
    seen: dict[int, list[int]] = {}
    for of in steps.values():
        for step in of:
            seen.setdefault((step.number - 1) // STEPS_PER_EPOCH, []).extend(step.samples)
    return list(seen.values())


def origins_s(attempts: list[Attempt]) -> dict[int, float]:
    """Return where the clock of the training stands at 0, by launch: the time between two launches does not count."""
    origins: dict[int, float] = {}
    gone_s = 0.0
    for number, launch in groupby((attempt for attempt in attempts if attempt.steps), lambda attempt: attempt.launch):
        steps = [step.seconds for attempt in launch for step in attempt.longest]
        origins[number] = steps[0] - gone_s
        gone_s += steps[-1] - steps[0]
    return origins


def kill_rows(attempts: list[Attempt], kills: list[Kill]) -> list[dict[str, Any]]:
    """Return a line for every kill: when and whom it hit, after which step the run went on, and when."""
    rows: list[dict[str, Any]] = []
    zero_s = origins_s(attempts)
    for before, after in pairwise(attempts):
        kill = next((kill for kill in kills if (kill.launch, kill.restart) == (before.launch, before.restart)), None)
        if kill is not None and after.launch == before.launch and after.steps:
            rows.append(
                {
                    "kill": len(rows) + 1,
                    "process": kill.process,
                    "after_step": kill.step,
                    "went_on_after_step": after.from_step,
                    "steps_done_again": kill.step - after.from_step,
                    "seconds_to_next_step": min(of[0].seconds for of in after.steps.values()) - kill.seconds,
                    "at_seconds": kill.seconds - zero_s[kill.launch],
                }
            )
    return rows


def draw(alone: Attempt, attempts: list[Attempt], rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return both pictures by their captions."""
    deaths = [
        Death(
            row["at_seconds"],
            row["after_step"],
            row["process"],
            row["went_on_after_step"],
            row["at_seconds"] + row["seconds_to_next_step"],
        )
        for row in rows
    ]

    def seconds(attempt: Attempt, zero_s: float) -> list[tuple[float, float]]:
        return [(step.seconds - zero_s, step.number) for step in attempt.longest]

    trained = [attempt for attempt in attempts if len(attempt.steps) == len(alone.steps)]
    zero_s = origins_s(trained)
    starts = [list(losses(attempt.steps).items()) for attempt in trained]
    progress = [seconds(attempt, zero_s[attempt.launch]) for attempt in trained]
    return {
        "Training loss, the mean of all processes: the killed run lies on the one left alone, and so do the steps that it had to "
        "do again (shaded).": draw_losses(list(losses(alone.steps).items()), starts, deaths),
        "Steps against time: each kill throws the run back to the last state that all processes had in memory.": draw_progress(
            seconds(alone, alone.longest[0].seconds), progress, deaths
        ),
    }


def verdict(differing: list[str], deaths: list[dict[str, Any]]) -> str:
    """Return what was found, in a sentence."""
    if differing:
        return f"the killed run differs from the one left alone in: {', '.join(differing)}"
    seconds = ", ".join(f"{row['seconds_to_next_step']:.1f}" for row in deaths)
    recovered = f"; seconds from kill to next step: {seconds}" if deaths else ""
    return f"{len(deaths)} kills, and the run ended with the same bits as the one left alone{recovered}"


def report(
    cli: CLI,
    run: RunFolder,
    rows: list[dict[str, Any]],
    deaths: list[dict[str, Any]],
    pictures: dict[str, bytes],
    differing: list[str],
) -> None:
    """Write ``report.html``: what was found, kills, pictures, and what was compared."""
    knobs = cli.config
    sentence = verdict(differing, deaths)
    lines = [
        f"{sentence[0].upper()}{sentence[1:]}.",
        f"{knobs.processes} processes trained a net of convolutions with dropout and batch normalization for {cli.steps} steps "
        f"(seed {knobs.seed_everything}), twice: once without MemoryCheckpoint and without a kill, and once with a capture every "
        f"{knobs.capture_every} steps and SIGKILLs at moments that the launcher drew from the clock.",
        "A process that is killed says nothing and saves nothing: the others fail at their next exchange, torchrun's agent "
        "starts all of them again, and they go on from the newest state that the keeper has of all in its memory.",
    ]
    sections: list[Any] = [Text(lines)]
    if deaths:
        sections.append(Table(deaths, caption="Seconds from the SIGKILL to the end of the first step after it.", heading="Kills"))
    sections += [Figure(picture, caption) for caption, picture in pictures.items()]
    sections.append(Table(rows, caption="Bit by bit, by SHA-256; losses as they are.", heading="What is equal"))
    write_report(run.path / "report.html", "A run that was killed and went on", sections)
