"""What it costs to level a photograph's file: seconds and peak memory, each run in a process of its own.

    python benchmarks/upright_files.py

A JPEG of a smooth scene with noise, tilted by 25 degrees. ``level_file`` reads, rotates and writes it with its tags, and with
``tags_only`` rewrites the tags alone. ``rotate_in_tiles`` is the rotation by itself. Its rivals: ``rotate_equirectangular``,
which takes the image at once, as far as that fits into memory; and OpenCV's remap by a map of the whole image, padded over seam
and poles, whose bicubic kernel has another parameter and whose coordinates are rounded to 1/32 pixel. All three include what they
prepare, and exclude reading and writing. Rounds alternate; seconds are the least of them, memory the most.

Writes: benchmarks/results/upright_files.csv.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _results import write_results

HEIGHTS_PX = (2048, 4096)
# Beyond this the image at once needs more memory than most machines have.
MAX_AT_ONCE_PX = 2048
METHODS = ("level_file", "tags_only", "rotate_in_tiles", "opencv_remap", "rotate_equirectangular")
ROUNDS = 2
UP = (0.26, 0.33, 0.90)


def write_photograph(path: Path, height: int) -> None:
    """Write a scene ``(height, 2 * height, 3)`` as JPEG of quality 95."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    row, column = np.linspace(0, np.pi, height), np.linspace(0, 2 * np.pi, 2 * height)
    scene = 128 + 90 * np.cos(row)[:, None] * np.sin(3 * column)
    noisy = scene[..., None] + generator.normal(scale=4, size=(height, 2 * height, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def measure(method: str, path: Path) -> dict[str, float]:
    """Run one method in this process and return its seconds and the process's peak memory."""
    import time

    import torch

    from lightning_plugins._support.images import read_panorama
    from lightning_plugins.engines.sphere import rotate_equirectangular, rotate_in_tiles, rotation_from_up
    from lightning_plugins.models.panoramic_upright.levelled_file import level_file

    rotation = rotation_from_up(torch.tensor(UP))
    image = None if method in ("level_file", "tags_only") else read_panorama(path)
    start = time.perf_counter()
    if image is None:
        level_file(path, path.with_stem("level"), UP, tags_only=method == "tags_only")
    elif method == "rotate_in_tiles":
        rotate_in_tiles(image, rotation)
    elif method == "opencv_remap":
        remap(image, rotation)
    else:
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        rotate_equirectangular(planes, rotation, "bicubic").round_().clamp_(0, 255).byte()
    seconds = time.perf_counter() - start
    # What getrusage gives counts the process that started this one as well.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"seconds": seconds, "peak_gib": int(status["VmHWM"].split()[0]) / 2**20}


def remap(image: Any, rotation: Any) -> Any:
    """Rotate an image by OpenCV."""
    import cv2
    import numpy as np

    from lightning_plugins.engines.sphere import directions_to_pixels, pixel_directions

    height, width = image.shape[:2]
    padded = np.concatenate([image[1::-1], image, image[:-3:-1]])
    padded[:2], padded[-2:] = np.roll(padded[:2], width // 2, 1), np.roll(padded[-2:], width // 2, 1)
    padded = np.concatenate([padded[:, -2:], padded, padded[:, :2]], axis=1)
    pixels = (directions_to_pixels(pixel_directions(height, width) @ rotation, height, width) + 2).numpy()
    return cv2.remap(padded, pixels, None, cv2.INTER_CUBIC)


def main() -> None:
    """Print and write the table."""
    import torch

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for height in HEIGHTS_PX:
            path = Path(folder) / f"room{height}.jpg"
            write_photograph(path, height)
            methods = [method for method in METHODS if method != "rotate_equirectangular" or height <= MAX_AT_ONCE_PX]
            runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
            for _ in range(ROUNDS):
                for method in methods:
                    command = [sys.executable, __file__, method, str(path)]
                    runs[method].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            for method, measured in runs.items():
                seconds, peak_gib = min(run["seconds"] for run in measured), max(run["peak_gib"] for run in measured)
                print(f"{2 * height} x {height}  {method:24}{seconds:8.2f} s{peak_gib:8.2f} GiB")
                size = {"width_px": 2 * height, "height_px": height, "threads": torch.get_num_threads()}
                rows.append({"method": method, **size, "seconds": f"{seconds:.2f}", "peak_gib": f"{peak_gib:.2f}"})
    write_results("upright_files", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
