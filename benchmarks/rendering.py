"""Rooms rendered per second on one core: image, depth, mask and tilt, both distributions, three sizes.

Promise: at least 25 scenes of 128 x 256 per second on one core, RGB included. There is no rival to run beside it: no package
renders furnished panoramic rooms with depth from a seed. Every repeat renders other seeds; the figure is the median over the
repeats.

Run: OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/rendering.py
Writes: benchmarks/results/rendering.csv
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import time

from _results import write_results

from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, TRAINING_ROOMS, RoomDistribution, render_room

HEIGHTS = (64, 128, 256)
REPEATS = 7
SCENES = 30


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


def main() -> None:
    """Measure, print, write."""
    rows = []
    print(f"{'rooms':10} {'size':>9} {'scenes/s':>9} {'slowest':>9} {'fastest':>9} {'per cpu s':>13}")
    for name, distribution in (("training", TRAINING_ROOMS), ("held-out", HELD_OUT_ROOMS)):
        for height in HEIGHTS:
            rates, processor_rates = scenes_per_second(height, distribution)
            figures = {
                "scenes_per_s_median": statistics.median(rates),
                "scenes_per_s_min": min(rates),
                "scenes_per_s_max": max(rates),
                "scenes_per_processor_s_median": statistics.median(processor_rates),
            }
            median, low, high, by_processor = figures.values()
            print(f"{name:10} {f'{height}x{2 * height}':>9} {median:9.1f} {low:9.1f} {high:9.1f} {by_processor:13.1f}")
            setting = {"rooms": name, "height": height, "width": 2 * height, "repeats": REPEATS, "scenes_per_repeat": SCENES}
            rows.append({**setting, **{key: f"{value:.1f}" for key, value in figures.items()}, "cores_allowed": cores_allowed()})
    print(f"wrote {write_results('rendering', rows)}", file=sys.stderr)


def cores_allowed() -> int | None:
    """Return how many cores this process may run on: 1 for the promise."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


if __name__ == "__main__":
    main()
