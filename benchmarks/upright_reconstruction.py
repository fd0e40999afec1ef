"""What levelling loses, and what of it comes back: resampling, residual tilts, the refiner and its gate, the lookup tables.

    python benchmarks/upright_reconstruction.py [FOLDER] [--ckpt FILE] [--tiny]

Images are the level photographs of FOLDER at 512 x 1024, or held-out rooms without one, each under two tilts, even over the cone
of 20 degrees. PSNR is the mean over images, in dB, WS-PSNR weighs pixels by their solid angle.

- ``round trip``: turned and turned back, both bilinear or both bicubic, with the true angle or one that is off by
  ``residual_deg``.
- ``camera``, with ``--ckpt``, the checkpoint of a ``PanoramicUpright`` that reconstructs: turned at full size, then halved, so
  that the tilted image is as sharp as the level one, as a camera's is. Plain bilinear and bicubic resampling, the refined image
  and the gated one, with the true and with the predicted angle. ``worst_gain_db`` is the least that any image gains over plain
  bicubic by WS-PSNR; ``gate_precision`` the share of images of which the gate took the better candidate; ``gate_refined_share``
  that of which it took the refined one. Where a predicted angle is wrong by some pixels, the softer of two images is always the
  nearer one to the truth, and the gate's precision says nothing. Rooms and photographs apart.
- ``table``: angles between a table and the closed form in float64, over tilts and azimuths with 0, 90 and 180 degrees and the
  seam, at 256 x 512, and milliseconds for one table, medians of runs in turn; in one process with OMP_NUM_THREADS threads.

Writes: benchmarks/results/upright_reconstruction.csv; --tiny tries it out on small images and writes nothing.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import write_results
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins import PanoramicUpright
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import find_panoramas, read_panorama
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, render_room
from lightning_plugins.engines.rendering.render import draw_tilt
from lightning_plugins.engines.sphere import (
    resize_equirectangular,
    rotate_equirectangular,
    rotation_from_up,
    sample_equirectangular,
)
from lightning_plugins.models.checkpoint import load_module
from lightning_plugins.models.panoramic_upright.lookup_table import AnalyticLookupTable, LearnedLookupTable, fit_lookup_table
from lightning_plugins.models.panoramic_upright.reconstruction_metrics import psnr_db
from lightning_plugins.models.panoramic_upright.validation import gate_is_right

MAX_TILT_DEG = 20.0
TILTS_PER_IMAGE = 2
RESIDUALS_DEG = (0.0, 0.5, 1.0, 2.0, 5.0)
# The test rooms of RenderedRooms(seed=0).
FIRST_SEED = 2 << 48
ROOMS = 16
TABLE_TILTS_DEG = (0, 0.01, 1, 5, 20, 45, 89.9, 90, 90.1, 135, 170, 179.9, 180)
TABLE_AZIMUTHS_DEG = (-180, -179.9, -135, -90, -45, 0, 45, 90, 135, 179.9)
REPEATS = 15


def photographs(folder: str, height: int) -> Iterator[Tensor]:
    """Yield level images ``(1, 3, height, 2 height)``."""
    for path in find_panoramas(folder):
        pixels = torch.from_numpy(read_panorama(path)).permute(2, 0, 1).float()[None] / 255
        yield resize_equirectangular(pixels, height, 2 * height)


def rooms(count: int, height: int) -> Iterator[Tensor]:
    """Yield level images ``(1, 3, height, 2 height)`` of held-out rooms."""
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        image = render_room(seed, height, 2 * height, HELD_OUT_ROOMS).image
        yield torch.from_numpy(image).permute(2, 0, 1).float()[None] / 255


def tilts(level: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every level image with each of its up-vectors ``(1, 3)``."""
    generator = np.random.default_rng(0)
    for image in level:
        for _ in range(TILTS_PER_IMAGE):
            yield image, torch.from_numpy(draw_tilt(generator, MAX_TILT_DEG)[2:]).float()


def off_by(up: Tensor, degrees: float) -> Tensor:
    """Return up ``(1, 3)`` turned by so much about the horizontal axis across its own tilt, and an eighth turn on."""
    across = torch.linalg.cross(up, torch.tensor([[0.6, 0.8, 0.0]]))
    across = across / across.norm()
    return math.cos(math.radians(degrees)) * up + math.sin(math.radians(degrees)) * across


def round_trips(level: list[Tensor]) -> Iterator[dict[str, Any]]:
    """Yield a row for each reading and residual tilt."""
    for reading in ("bilinear", "bicubic"):
        for residual_deg in RESIDUALS_DEG:
            found = []
            for image, up in tilts(iter(level)):
                turned = rotate_equirectangular(image, rotation_from_up(up).mT, reading).clamp(0, 1)
                back = rotate_equirectangular(turned, rotation_from_up(off_by(up, residual_deg)), reading)
                found.append([float(psnr_db(back, image, weighted)) for weighted in (False, True)])
            yield {"check": "round trip", "image": reading, "residual_deg": residual_deg, **decibels(found)}


def decibels(found: list[list[float]]) -> dict[str, Any]:
    """Return the means of pairs of PSNR and WS-PSNR, and the range of the first."""
    psnr, ws_psnr = np.mean(found, axis=0)
    low, high = np.min(found, axis=0)[0], np.max(found, axis=0)[0]
    figures = {"psnr_db": psnr, "ws_psnr_db": ws_psnr, "least_psnr_db": low, "largest_psnr_db": high}
    return {name: f"{figure:.2f}" for name, figure in figures.items()} | {"images": len(found)}


def camera(model: PanoramicUpright, name: str, level: list[Tensor]) -> Iterator[dict[str, Any]]:
    """Yield a row for each way of levelling a set of images, with the true angle and with the predicted one."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    right: dict[str, list[bool]] = {"true": [], "predicted": []}
    took: dict[str, list[bool]] = {"true": [], "predicted": []}
    for image, up in tilts(iter(level)):
        height = image.shape[2] // 2
        tilted = rotate_equirectangular(image, rotation_from_up(up).mT, "bicubic")
        tilted, truth = (resize_equirectangular(part, height, 2 * height).clamp(0, 1) for part in (tilted, image))
        for angle, direction in (("true", up), ("predicted", model.predict_up(tilted[0]).up[None])):
            candidates = model.network.level(tilted, direction)
            read = {
                "bilinear": sample_equirectangular(tilted, model.network.table_for(tilted, direction)),
                "bicubic": candidates.plain,
                "refined": candidates.refined,
                "gated": candidates.gated,
            }
            for way, result in read.items():
                found.setdefault((way, angle), []).append([float(psnr_db(result, truth, weighted)) for weighted in (False, True)])
            right[angle] += gate_is_right(candidates, truth).tolist()
            took[angle] += candidates.took_refined.tolist()
    for (way, angle), figures in found.items():
        row = {"check": "camera", "set": name, "image": way, "angle": angle, **decibels(figures)}
        if way in ("refined", "gated"):
            gains = np.subtract(figures, found["bicubic", angle])[:, 1]
            row |= {"mean_gain_db": f"{gains.mean():.2f}", "worst_gain_db": f"{gains.min():.2f}"}
        if way == "gated":
            row |= {"gate_precision": f"{np.mean(right[angle]):.3f}", "gate_refined_share": f"{np.mean(took[angle]):.3f}"}
        yield row


def closed_form(tilt_deg: float, azimuth_deg: float, height: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return up and its table by Rodrigues' formula: level directions turned about the axis across the tilt; float64."""
    tilt, azimuth = math.radians(tilt_deg), math.radians(azimuth_deg)
    colatitude = (np.arange(height)[:, None] + 0.5) / height * np.pi
    longitude = (np.arange(2 * height) + 0.5) / height * np.pi - np.pi
    parts = np.sin(colatitude) * np.cos(longitude), -np.sin(colatitude) * np.sin(longitude), np.cos(colatitude)
    level = np.stack(np.broadcast_arrays(*parts), -1)
    axis = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    along = (level @ axis)[..., None] * axis * (1 - math.cos(tilt))
    up = np.array([math.sin(tilt) * math.cos(azimuth), math.sin(tilt) * math.sin(azimuth), math.cos(tilt)])
    return up, level * math.cos(tilt) + np.cross(axis, level) * math.sin(tilt) + along


def tables(height: int) -> Iterator[dict[str, Any]]:
    """Yield a row for the analytic table and one for the learned."""
    torch.manual_seed(0)
    learned = LearnedLookupTable(height, 2 * height)
    fit_lookup_table(learned)
    made: dict[str, Callable[[Tensor], Tensor]] = {"analytic": AnalyticLookupTable(height, 2 * height), "learned": learned}
    errors_deg: dict[str, list[NDArray[np.float64]]] = {name: [] for name in made}
    for tilt_deg in TABLE_TILTS_DEG:
        for azimuth_deg in TABLE_AZIMUTHS_DEG:
            up, exact = closed_form(tilt_deg, azimuth_deg, height)
            for name, table in made.items():
                chord = np.linalg.norm(table(torch.from_numpy(up[None]).float())[0].double().numpy() - exact, axis=-1)
                errors_deg[name].append(np.degrees(2 * np.arcsin(np.minimum(chord / 2, 1))))
    one = torch.tensor([[0.2, -0.1, 0.9]])
    times_ms: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(REPEATS):
        for name, table in made.items():
            start_s = time.perf_counter()
            table(one)
            times_ms[name].append(1e3 * (time.perf_counter() - start_s))
    for name in made:
        errors = np.stack(errors_deg[name])
        figures = {"mean_deg": errors.mean(), "p99_deg": np.percentile(errors, 99), "max_deg": errors.max()}
        row = {"check": "table", "set": f"{height} x {2 * height}", "image": name}
        yield (
            row
            | {key: f"{figure:.2g}" for key, figure in figures.items()}
            | {
                "ms": f"{statistics.median(times_ms[name]):.2f}",
                "threads": torch.get_num_threads(),
            }
        )


@torch.no_grad()
def main() -> None:
    """Print every row, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", help="level photographs; without it, held-out rooms")
    parser.add_argument("--ckpt", help="checkpoint of a PanoramicUpright(reconstruct=True)")
    parser.add_argument("--tiny", action="store_true", help="try it out: small images, nothing is written")
    given = parser.parse_args()
    height, count = (64, 2) if given.tiny else (512, ROOMS)
    model = load_module(PanoramicUpright, given.ckpt) if given.ckpt else None
    if model is not None and model.network.reconstruction is None:
        raise InputError(f"{given.ckpt} holds no refiner; give the checkpoint of a PanoramicUpright(reconstruct=True)")
    sets = {"photographs": [*photographs(given.folder, height)]} if given.folder else {}
    if model is not None or not sets:
        sets["rooms"] = [*rooms(count, height)]
    rows = []

    def say(made: Iterator[dict[str, Any]]) -> None:
        for row in made:
            print(
                "  ".join(
                    f"{name} {value}" if name.endswith(("_deg", "_db", "ms")) else str(value) for name, value in row.items()
                )
            )
            rows.append(row)

    name, level = next(iter(sets.items()))
    say({**row, "set": name} for row in round_trips(level))
    if model is not None:
        for name, level in sets.items():
            say(camera(model, name, level))
    say(tables(height // 2))
    if not given.tiny:
        # The command is recorded without the folders of the machine that ran it.
        sys.argv[1:] = [Path(part).name if not part.startswith("--") else part for part in sys.argv[1:]]
        write_results("upright_reconstruction", rows)


if __name__ == "__main__":
    main()
