"""Rooms rendered per second on one core: image, depth, mask and tilt, both distributions, three sizes.

Promise: at least 25 scenes of 128 x 256 per second on one core, RGB included. There is no rival to run beside it: no package
renders furnished panoramic rooms with depth from a seed. Every repeat renders other seeds; the figure is the median over the
repeats.

Run: OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/rendering.py
Writes: benchmarks/results/rendering.csv
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, TRAINING_ROOMS, RoomDistribution, render_room

HEIGHTS = (64, 128, 256)
REPEATS = 7
SCENES = 30
RESULT = Path(__file__).parent / "results" / "rendering.csv"


def scenes_per_second(height: int, distribution: RoomDistribution) -> tuple[list[float], list[float]]:
    """Return one rate for every repeat: by the clock, and by the processor's time, which busy neighbours lower less."""
    render_room(0, height, 2 * height, distribution)  # noise tiles and pixel directions are made once
    rates, processor_rates = [], []
    for repeat in range(REPEATS):
        seeds = range(repeat * SCENES, (repeat + 1) * SCENES)
        start_s, start_processor_s = time.perf_counter(), time.process_time()
        for seed in seeds:
            render_room(seed, height, 2 * height, distribution)
        rates.append(SCENES / (time.perf_counter() - start_s))
        processor_rates.append(SCENES / (time.process_time() - start_processor_s))
    return rates, processor_rates


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Measure, print, write."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    setting = {
        "repeats": REPEATS,
        "scenes_per_repeat": SCENES,
        "processor": processor(),
        "cores_allowed": cores,
        "omp_num_threads": os.environ["OMP_NUM_THREADS"],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "command": "OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/rendering.py",
    }
    rows = []
    print(f"{setting['processor']}, {cores} core(s) allowed, numpy {np.__version__}")
    print(f"{'rooms':10} {'size':>9} {'scenes/s':>9} {'slowest':>9} {'fastest':>9} {'per cpu s':>13}")
    for name, distribution in (("training", TRAINING_ROOMS), ("held-out", HELD_OUT_ROOMS)):
        for height in HEIGHTS:
            rates, processor_rates = scenes_per_second(height, distribution)
            median, low, high = statistics.median(rates), min(rates), max(rates)
            by_processor = statistics.median(processor_rates)
            print(f"{name:10} {f'{height}x{2 * height}':>9} {median:9.1f} {low:9.1f} {high:9.1f} {by_processor:13.1f}")
            figures = {
                "scenes_per_s_median": median,
                "scenes_per_s_min": low,
                "scenes_per_s_max": high,
                "scenes_per_processor_s_median": by_processor,
            }
            rows.append(
                {"rooms": name, "height": height, "width": 2 * height} | {k: f"{v:.1f}" for k, v in figures.items()} | setting
            )
    RESULT.parent.mkdir(exist_ok=True)
    with atomic_write(RESULT, "w") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {RESULT}", file=sys.stderr)


if __name__ == "__main__":
    main()
