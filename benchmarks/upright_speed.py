"""Whether panoramas are levelled in real time: frames a second from image to level image, and what the table alone costs.

    OMP_NUM_THREADS=1 python benchmarks/upright_speed.py [--height 128] [--tiny]

An image of 256 x 512 is halved to the network's input, its up-vector estimated, the table made, and the image read through it,
bilinearly; no decoding, no batch. Untrained weights: speed does not depend on them. Both tables alternate within each round,
and what is printed is the median over the rounds. The tables are measured alone too, as is a whole video, from a file to a
file, with its two decodings and bicubic rotation. One thread is steadier: on a machine whose cores are busy already, two wait
for each other. On a GPU, where there is one, 512 x 1024 and 2048 x 4096 as well.

Writes: benchmarks/results/upright_speed.csv.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import write_results
from torch import Tensor, nn

from lightning_plugins.engines.sphere import resize_equirectangular, sample_equirectangular
from lightning_plugins.models.panoramic_upright.lookup_table import AnalyticLookupTable, LearnedLookupTable
from lightning_plugins.models.panoramic_upright.orientation import OrientationNetwork, expected_error_deg
from lightning_plugins.models.panoramic_upright.video import level_video

HEIGHT_PX = 256
GPU_HEIGHTS_PX = (512, 2048)
ROUNDS = 30
VIDEO_FRAMES = 60
GOAL_FRAMES_PER_S = 15.0
GOAL_TABLE_MS = 5.0


def seconds(run: Callable[[], object], device: str) -> float:
    """Return how long a call takes, until its result is there."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(runs: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of each call; they alternate, and the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            taken[name].append(seconds(run, device))
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def measure(height: int, input_height: int, device: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of the whole way with each table, and of each table alone."""
    network = OrientationNetwork().eval().to(device)
    image = torch.rand(1, 3, height, 2 * height, device=device)
    tables = {
        "analytic": AnalyticLookupTable(height, 2 * height).to(device),
        "learned": LearnedLookupTable(height, 2 * height).eval().to(device),
    }
    up = network(resize_equirectangular(image, input_height, 2 * input_height))

    def whole(table: nn.Module) -> Tensor:
        vector = network(resize_equirectangular(image, input_height, 2 * input_height))
        return sample_equirectangular(image, table(vector), "bilinear")

    runs: dict[str, Callable[[], object]] = {}
    for name, table in tables.items():
        runs[f"end_to_end, {name}"] = lambda table=table: whole(table)
        runs[f"table, {name}"] = lambda table=table: table(up)
    return medians(runs, device, rounds)


def measure_video(input_height: int, frames: int) -> float:
    """Return the seconds that a frame of a video takes, from a file to a file."""
    import cv2
    import numpy as np

    network = OrientationNetwork().eval()

    def estimate(image: Tensor) -> tuple[Tensor, float]:
        vector = network(image[None])
        return vector[0], min(float(expected_error_deg(vector)), 10.0)  # untrained, it would say that it sees no cue

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tilted.mp4"
        writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (2 * HEIGHT_PX, HEIGHT_PX))
        scene = cv2.resize(generator.integers(0, 255, (32, 64, 3)).astype(np.uint8), (2 * HEIGHT_PX, HEIGHT_PX))
        for frame in range(frames):
            writer.write(np.roll(scene, 2 * frame, axis=1))
        writer.release()
        start = time.perf_counter()
        level_video(source, Path(folder) / "level.mp4", estimate, estimate_height_px=input_height)
        return (time.perf_counter() - start) / frames


def row(what: str, table: str, device: str, height: int, input_height: int, taken_s: float) -> dict[str, Any]:
    """Print and return one row, with its goal on the CPU at 256 x 512 and whether it is held."""
    alone = what == "table"
    goal, held = (f"< {GOAL_TABLE_MS:g} ms", taken_s * 1e3 < GOAL_TABLE_MS) if alone else (
        f">= {GOAL_FRAMES_PER_S:g} frames/s", 1 / taken_s >= GOAL_FRAMES_PER_S
    )  # fmt: skip
    # The goal for a table is that of the exact one, and all are for the CPU.
    has_goal = device == "cpu" and not (alone and table == "learned")
    verdict = ("held" if held else "MISSED") if has_goal else ""
    print(
        f"{what:12}{table:10}{device:6}{height:5} x {2 * height:<6}{taken_s * 1e3:9.2f} ms{1 / taken_s:9.1f} frames/s   {verdict}"
    )
    return {
        "what": what, "table": table, "device": device, "threads": torch.get_num_threads(),
        "output_height_px": height, "output_width_px": 2 * height, "input_height_px": "" if alone else input_height,
        "ms": f"{taken_s * 1e3:.3f}", "frames_per_s": f"{1 / taken_s:.1f}",
        "goal": goal if has_goal else "", "verdict": verdict,
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description="frames a second from image to level image")
    parser.add_argument("--height", type=int, default=128, help="rows of the network's input (default 128)")
    parser.add_argument("--tiny", action="store_true", help="two rounds, nothing written: that it runs")
    arguments = parser.parse_args()
    rounds, frames = (2, 4) if arguments.tiny else (ROUNDS, VIDEO_FRAMES)
    places = [("cpu", HEIGHT_PX)]
    if torch.cuda.is_available():
        places += [("cuda", height) for height in (HEIGHT_PX, *GPU_HEIGHTS_PX)]
    rows = []
    for device, height in places:
        for name, taken_s in measure(height, arguments.height, device, rounds).items():
            rows.append(row(*name.split(", "), device, height, arguments.height, taken_s))
    rows.append(row("video", "", "cpu", HEIGHT_PX, arguments.height, measure_video(arguments.height, frames)))
    if not arguments.tiny:
        write_results("upright_speed", rows)


if __name__ == "__main__":
    main()
