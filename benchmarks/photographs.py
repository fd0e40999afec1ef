"""What a trained student does with real photographs, which have no true depth: laws that any depth map must obey.

    python benchmarks/photographs.py runs/panoramic_depth/<date-time>/student.ckpt FOLDER

Each photograph is rolled through 64 positions, so that the seam visits every place of the scene:

- ``seam_ratio``: mean jump of log depth from the last column to the first, over that between other neighbours; 1 is seamless.
- ``nadir_spread``: (largest - smallest) / mean of the depths of the last row, which are one point; the worst position.
- ``roll_correlation``: correlation of the rolled photograph's log depth with the photograph's rolled log depth; the worst
  position. Most positions are no multiple of the network's stride.

Writes ``results/photographs.csv``.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from _results import write_results

from lightning_plugins import PanoramicDepth
from lightning_plugins._support.images import find_panoramas, read_panorama
from lightning_plugins.models.checkpoint import load_module

POSITIONS = 64


def laws(model: PanoramicDepth, photograph: torch.Tensor) -> dict[str, float]:
    """Return the figures of one photograph ``(3, H, W)``."""
    depth_m = model.predict_panorama(photograph)
    log_depth = depth_m.log()
    width = depth_m.shape[1]
    seam, inside, spread, correlation = [], [], [], []
    for position in range(POSITIONS):
        columns = position * width // POSITIONS
        rolled = model.predict_panorama(photograph.roll(columns, 2)).log()
        jumps = (rolled - rolled.roll(1, 1)).abs().mean(dim=0)  # jumps[0] is the one across the seam
        seam.append(float(jumps[0]))
        inside.append(float(jumps[1:].mean()))
        nadir = rolled[-1].exp()
        spread.append(float((nadir.max() - nadir.min()) / nadir.mean()))
        correlation.append(float(np.corrcoef(rolled.flatten(), log_depth.roll(columns, 1).flatten())[0, 1]))
    return {
        "seam_ratio": float(np.mean(seam) / np.mean(inside)),
        "nadir_spread": max(spread),
        "roll_correlation": min(correlation),
        "nadir_m": float(depth_m[-1].mean()),
        "median_m": float(depth_m.median()),
    }


def main(checkpoint: str, folder: str) -> None:
    """Print and write a row per photograph."""
    model = load_module(PanoramicDepth, checkpoint)
    rows = []
    for path in find_panoramas(folder):
        pixels = torch.from_numpy(read_panorama(path)).permute(2, 0, 1).float() / 255
        rows.append({"photograph": path.name, **{name: round(figure, 4) for name, figure in laws(model, pixels).items()}})
        print(rows[-1])
    # The command is recorded without the folders of the machine that ran it.
    sys.argv[1:] = [Path(checkpoint).name, Path(folder).name]
    print(write_results("photographs", rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
