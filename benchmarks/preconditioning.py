"""Step time of every preconditioner and of its rivals, as a ratio to plain SGD, in one alternating run on one thread.

Every variant has a net of its own and takes whole training steps (forward, backward, update) in turn with the others, in an order
that is shuffled every round, so that busy neighbours slow all. What is refreshed every 10 or 100 steps is counted in whole
periods: ``ms`` is the mean over the measured periods in which each step counts with the median of its kind (the refresh, the step
after it, one that only observes, any other); ``mean_ms`` is the plain mean. The ratio divides by plain SGD's ``ms``;
``processor_ratio`` is the same of the processor's time, which busy neighbours raise less.
``state_bytes`` is the most that is held besides parameters and gradients, looked at after backward and after the step.

Rivals come from requirements-preconditioning.txt, in an environment of their own that sees this project's; one that cannot run
has a row that says why. Of settings that change its speed alone, a rival gets the fastest (``settings``).

With ``--gpu``: ResNet-50 at batch 256, channels last, and a 124M GPT at 32k tokens, bfloat16, compiled; each variant in turn with
plain SGD, and its peak memory as a ratio to SGD's. ``--gpu --tiny`` tries that on a CPU and writes nothing.

Run: OMP_NUM_THREADS=1 python benchmarks/preconditioning.py      (6 minutes)
     python benchmarks/preconditioning.py --gpu
Writes: benchmarks/results/preconditioning.csv, preconditioning_gpu.csv
"""

import argparse
import gc
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _nets import GPT, cnn, mlp
from _peers import NOT_CARRIED, missing, peers
from _results import write_results
from _step_time import LEARNING_RATE, Batch, OptimizerStepper, OurStepper, Variant, alternate
from torch import nn

ROUNDS = 100
# Steps that a variant takes within the rounds, by its period: whole periods, and enough for a median where every step is alike.
STEPS = {1: 15, 10: 30, 100: 100}
# One whose steps take longer than this gets fewer: a period of 10, or 5 steps that are all alike.
SLOW_MS = 1000.0

BOTH = {"factor_every": 10, "inverse_every": 100}
TENTH = {"inverse_every": 10}
# Variant, method and its options; all else stands at its default, but for the warm-up, which is left out.
OURS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("kfac every step", "kfac", {}),
    ("kfac 10/100", "kfac", BOTH),
    ("kfac max_dim=1024", "kfac", {"max_dim": 1024}),
    ("kfac max_dim=1024 10/100", "kfac", {"max_dim": 1024} | BOTH),
    ("kfac mc", "kfac", {"fisher": "mc"}),
    ("ekfac every step", "ekfac", {}),
    ("ekfac 10/100", "ekfac", BOTH),
    *((method, method, {}) for method in ("foof", "diag", "full", "layer", "kbfgs", "seng", "psgd", "muon")),
    ("shampoo T=1", "shampoo", {}),
    ("shampoo T=10", "shampoo", TENTH),
    ("soap f=10", "soap", TENTH),
)
# Net, batch, how it is made, its input, and goals as ratios.
NETS: tuple[tuple[str, int, Callable[[], nn.Module], tuple[int, ...], dict[str, float]], ...] = (
    (
        *("MLP 784-512-512-10", 256, mlp, (784,)),
        {"kfac every step": 4.8, "kfac 10/100": 2.6, "shampoo T=10": 6.0, "soap f=10": 6.5},
    ),
    ("MLP 784-512-512-10", 4096, mlp, (784,), {"kfac 10/100": 1.25}),
    ("CNN 32-64-128-10", 64, cnn, (3, 32, 32), {"kfac every step": 5.0}),
)
# The step is many times as long there, and the preconditioners' share small; these show it.
AT_LARGE_BATCH = ("kfac every step", "kfac 10/100", "ekfac 10/100", "shampoo T=10", "soap f=10", "psgd")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the large nets, on a GPU")
    parser.add_argument("--tiny", action="store_true", help="small sizes and few rounds, to try the script; writes nothing")
    parser.add_argument("--net", default="", help="only nets whose name has this in it; writes nothing")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # the rivals' own deprecations
    rows = []
    print(f"{'variant':34} {'ms':>8} {'mean':>8} {'ratio':>7} {'by cpu':>7} {'state MB':>9}  goal")
    if given.gpu:
        for row in gpu_rows(given.tiny):
            rows.append(show(row))
    else:
        torch.set_num_threads(1)
        for name, batch, make, shape, goals in NETS:
            if given.net in f"{name} {batch}":
                print(f"-- {name}, batch {batch}")
                for row in net_rows(make, (batch, *shape), goals, given.tiny):
                    rows.append(show({"net": name, "batch": batch} | row))
        for library, reason in NOT_CARRIED.items():
            rows.append(show(cannot(library, reason)))
    if not (given.tiny or given.net):
        print(f"wrote {write_results('preconditioning_gpu' if given.gpu else 'preconditioning', rows)}", file=sys.stderr)


def net_rows(
    make: Callable[[], nn.Module], shape: tuple[int, ...], goals: dict[str, float], tiny: bool
) -> Iterator[dict[str, Any]]:
    """Measure all variants on one net and yield their rows."""
    torch.manual_seed(0)
    batches = [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(4)]
    large = shape[0] > 1000
    variants = our_variants(make, AT_LARGE_BATCH if large else ())
    failed = [] if large else add_peers(variants, make, batches)
    for variant in variants:
        variant.warm_up(batches)
        variant.wanted = STEPS[variant.period]
        if tiny or variant.warm_s * 1e3 > SLOW_MS:
            variant.wanted = min(variant.wanted, 10 if variant.period == 10 else 5)
    alternate(variants, batches, ROUNDS)
    sgd = variants[0].figures()
    for variant in variants:
        yield row_of(variant, sgd, goals.get(variant.name))
    yield from failed


def our_variants(make: Callable[[], nn.Module], only: Sequence[str] = ()) -> list[Variant]:
    """Return plain SGD and ours."""
    net = seeded(make)
    sgd = OptimizerStepper(net, torch.optim.SGD(net.parameters(), lr=LEARNING_RATE))
    found = [Variant("SGD", f"torch {metadata.version('torch')}", sgd, period=100)]
    library = f"lightning_plugins {metadata.version('lightning_plugins')}"
    for name, method, options in OURS:
        if not only or name in only:
            settings = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
            stepper = OurStepper(seeded(make), method, options)
            found.append(Variant(name, library, stepper, settings, options.get("inverse_every", 1)))
    return found


def add_peers(variants: list[Variant], make: Callable[[], nn.Module], batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Add every rival that runs, with the fastest of its settings, and return rows that say why others do not."""
    failed = []
    for peer in peers():
        reason = missing(peer.distribution)
        longest = max(max(parameter.shape) for parameter in variants[0].stepper.net.parameters())
        if not reason and peer.longest_axis is not None and longest > peer.longest_axis:
            reason = f"has no cap on the axes that it decomposes, and one is {longest} long"
        candidates = []
        for settings, build in {} if reason else peer.choices.items():
            library = f"{peer.distribution} {metadata.version(peer.distribution)}"
            try:
                variant = Variant(peer.variant, library, build(seeded(make)), settings, peer.period, peer.check())
                variant.warm_up(batches)
            except Exception as error:  # a rival's failure is a result of this run, not its end
                reason = f"{settings}: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            candidates.append(variant)
        if candidates:
            variants.append(min(candidates, key=lambda variant: variant.warm_s))
        else:
            failed.append(cannot(peer.variant, reason))
    return failed


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the net with the same weights every time."""
    torch.manual_seed(0)
    return make()


def row_of(variant: Variant, sgd: dict[str, float], goal: float | None) -> dict[str, Any]:
    """Return a variant's row; ``met`` is empty where there is no goal."""
    figures = variant.figures()
    ratio = figures["ms"] / sgd["ms"]
    library, _, version = variant.library.partition(" ")
    return {
        "variant": variant.name,
        "library": library,
        "version": version,
        "ms": round(figures["ms"], 3),
        "mean_ms": round(figures["mean_ms"], 3),
        "steps": int(figures["steps"]),
        "ratio": round(ratio, 3),
        "processor_ratio": round(figures["processor_ms"] / sgd["processor_ms"], 3),  # on a GPU: of what the host does
        "state_bytes": variant.state_bytes,
        "goal": "" if goal is None else goal,
        "met": "" if goal is None else "yes" if ratio <= goal else "no",
        "settings": variant.settings,
        "note": variant.note or ("" if math.isfinite(variant.loss) else "its loss is not finite"),
    }


def cannot(variant: str, reason: str) -> dict[str, Any]:
    """Return the row of what could not run."""
    return {"variant": variant, "note": f"did not run: {reason}"}


COLUMNS = (
    "net",
    "batch",
    "variant",
    "library",
    "version",
    "ms",
    "mean_ms",
    "steps",
    "ratio",
    "processor_ratio",
    "state_bytes",
    "goal",
    "met",
    "settings",
    "note",
)


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row and return it with every column."""
    if "ms" not in row:
        print(f"{row['variant']:34} {row['note']}")
    else:
        goal = f"<= {row['goal']} {row['met']}" if row["met"] else ""
        times = f"{row['ms']:8.1f} {row['mean_ms']:8.1f} {row['ratio']:7.2f} {row['processor_ratio']:7.2f}"
        figures = f"{times} {row['state_bytes'] / 1e6:9.1f}"
        print(f"{row['variant']:34} {figures}  {goal} {row['note']}", flush=True)
    return {column: row.get(column, "") for column in COLUMNS} | {key: value for key, value in row.items() if key not in COLUMNS}


# On a GPU

GPU_VARIANTS = (
    ("kfac 10/100", "kfac", BOTH | {"ignore": ("embedding", "head")}),
    ("soap f=10", "soap", TENTH),
    ("shampoo T=10", "shampoo", TENTH),
)


def gpu_rows(tiny: bool) -> Iterator[dict[str, Any]]:
    """Measure both nets; every variant in turn with plain SGD, and its memory alone."""
    from torchvision.models import resnet18, resnet50  # type: ignore[import-untyped]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, tokens = ((4, 3, 32, 32), (2, 16)) if tiny else ((256, 3, 224, 224), (32, 1024))
    vision: Callable[[], nn.Module] = resnet18 if tiny else resnet50
    text = (lambda: GPT(32, 2, 2, 64, 16)) if tiny else GPT
    pictures = (
        torch.randn(images, device=device).to(memory_format=torch.channels_last),
        torch.randint(1000, images[:1]).to(device),
    )
    words = torch.randint(64 if tiny else 50304, tokens, device=device)
    for name, make, batch, goals, memory_goal in (
        ("ResNet-50", vision, pictures, {"kfac 10/100": 1.12}, 1.15),
        (
            "GPT 124M",
            text,
            (words, words.roll(-1, 1).flatten()),
            {"kfac 10/100": 1.10, "soap f=10": 1.15, "shampoo T=10": 1.10},
            None,
        ),
    ):
        print(f"-- {name}{' (tiny)' if tiny else ''}, batch {len(batch[0])}")
        for variant, method, options in GPU_VARIANTS:
            net = {"net": name, "batch": len(batch[0])}
            try:
                yield net | gpu_row(make, batch, variant, method, options, goals.get(variant), memory_goal, tiny)
            except torch.OutOfMemoryError as error:
                yield net | cannot(variant, f"out of memory: {str(error).splitlines()[0]}")


def gpu_row(
    make: Callable[[], nn.Module],
    batch: Batch,
    name: str,
    method: str,
    options: dict[str, Any],
    goal: float | None,
    memory_goal: float | None,
    tiny: bool,
) -> dict[str, Any]:
    """Measure one variant beside plain SGD."""
    cuda = torch.cuda.is_available()
    torch._dynamo.reset()
    gc.collect()
    peaks, variants = [], []
    for of in ("SGD", name):
        before = torch.cuda.memory_allocated() if cuda else 0
        net = seeded(make).cuda() if cuda else seeded(make)
        for parameter in (parameter for parameter in net.parameters() if parameter.ndim == 4):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        sgd = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
        stepper = OptimizerStepper(net, sgd) if of == "SGD" else OurStepper(net, method, options)
        stepper.forward = autocast(net if tiny else torch.compile(net))
        variant = Variant(of, f"lightning_plugins {metadata.version('lightning_plugins')}", stepper, str(options))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        variant.warm_up([batch] * 4)
        peaks.append(torch.cuda.max_memory_allocated() - before if cuda else 1)
        variant.wanted = 10 if tiny else ROUNDS
        variants.append(variant)
    alternate(variants, [batch], 10 if tiny else ROUNDS)
    memory = peaks[1] / peaks[0]
    row = row_of(variants[1], variants[0].figures(), None if tiny else goal)
    if not cuda:
        return row
    goal_of_memory = memory_goal if name == "kfac 10/100" else None
    met = "" if goal_of_memory is None else "yes" if memory <= goal_of_memory else "no"
    return row | {"memory_ratio": round(memory, 3), "memory_goal": goal_of_memory or "", "memory_met": met}


def autocast(net: Callable[..., Any]) -> Callable[..., Any]:
    """Return the net run in bfloat16 where there is a GPU."""

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            return net(inputs)

    return forward


if __name__ == "__main__":
    main()
