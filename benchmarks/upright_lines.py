"""How often the vertical lines of a panorama give up, and how exactly: the baseline that the upright network must beat.

    python benchmarks/upright_lines.py [FOLDER]

Held-out rooms at 256 x 512, and the photographs of a folder, which must be level, each under four tilts, even over the cone of
20 degrees. Prints the share of images whose up is within 1, 2, 3, 5 and 12 degrees, beside that of +z, the identity. Where the
lines give no cue, the identity stands in. Level photographs are turned at 512 x 1024 and then halved, so that the interpolation
leaves no blur that the rooms have not.

Writes: benchmarks/results/upright_lines.csv.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _results import write_results
from torch import Tensor

from lightning_plugins._support.images import find_panoramas, read_panorama
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, render_room
from lightning_plugins.engines.rendering.render import draw_tilt
from lightning_plugins.engines.sphere import resize_equirectangular, rotate_equirectangular
from lightning_plugins.models.panoramic_upright.vertical_lines import estimate_up_from_lines

HEIGHT_PX = 256
MAX_TILT_DEG = 20.0
ROOMS = 32
# The test rooms of RenderedRooms(seed=0).
FIRST_SEED = 2 << 48
TILTS_PER_PHOTOGRAPH = 4
LIMITS_DEG = (1, 2, 3, 5, 12)


def tilted_rooms() -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield images ``(3, H, W)`` and their true up."""
    distribution = replace(HELD_OUT_ROOMS, max_tilt_deg=MAX_TILT_DEG)
    for seed in range(FIRST_SEED, FIRST_SEED + ROOMS):
        room = render_room(seed, HEIGHT_PX, 2 * HEIGHT_PX, distribution)
        yield torch.from_numpy(room.image).permute(2, 0, 1), room.up


def tilted_photographs(folder: str) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield images ``(3, H, W)`` and their true up."""
    generator = np.random.default_rng(0)
    for path in find_panoramas(folder):
        pixels = torch.from_numpy(read_panorama(path)).permute(2, 0, 1).float()[None] / 255
        level = resize_equirectangular(pixels, 2 * HEIGHT_PX, 4 * HEIGHT_PX)
        for _ in range(TILTS_PER_PHOTOGRAPH):
            camera_to_level = draw_tilt(generator, MAX_TILT_DEG)
            tilted = rotate_equirectangular(level, torch.from_numpy(camera_to_level.T).float(), "bicubic")
            yield resize_equirectangular(tilted, HEIGHT_PX, 2 * HEIGHT_PX)[0].clamp(0, 1), camera_to_level[2]


def shares(name: str, images: Iterator[tuple[Tensor, np.ndarray]]) -> Iterator[dict[str, Any]]:
    """Yield and print a row for the lines and one for the identity."""
    level = np.array([0.0, 0.0, 1.0])
    errors_deg = []
    silent = 0
    for image, truth in images:
        estimate = estimate_up_from_lines(image, max_tilt_deg=MAX_TILT_DEG + 5)
        silent += estimate is None
        found = level if estimate is None else estimate.up.double().numpy()
        errors_deg.append([math.degrees(math.atan2(np.linalg.norm(np.cross(up, truth)), up @ truth)) for up in (found, level)])
    for predictor, errors in zip(("lines", "identity"), np.transpose(errors_deg), strict=True):
        within = {f"within_{limit}_deg": f"{100 * (errors < limit).mean():.1f}" for limit in LIMITS_DEG}
        print(
            f"{name:12}{predictor:10}{''.join(f'{share:>7}' for share in within.values())}   median {np.median(errors):5.2f} deg"
        )
        means = {"mean_deg": f"{errors.mean():.2f}", "median_deg": f"{np.median(errors):.2f}"}
        no_cue = silent if predictor == "lines" else ""
        yield {"set": name, "predictor": predictor, "tilt": "small", **within, **means, "images": len(errors), "no_cue": no_cue}
    print(f"{name:12}no cue in {silent} of {len(errors_deg)}")


def main(folder: str | None = None) -> None:
    """Print and write the shares of rooms, and of photographs where there is a folder of them."""
    print(" " * 22 + "".join(f"{f'< {limit}':>7}" for limit in LIMITS_DEG))
    rows = [*shares("rooms", tilted_rooms())]
    if folder is not None:
        rows += shares("photographs", tilted_photographs(folder))
    write_results("upright_lines", rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
