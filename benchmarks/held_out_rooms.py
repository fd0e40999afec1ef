"""What the held-out rooms are, and what predictors that see no image score on them: the bar that a depth model must clear.

Run again, and commit, whenever the rooms change. Writes ``results/held_out_rooms.csv`` (the distribution, training beside
held-out) and ``results/trivial_predictors.csv`` (scores under every protocol).
"""

from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from _results import write_results

from lightning_plugins import RenderedRooms
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, TRAINING_ROOMS
from lightning_plugins.models.panoramic_depth.baselines import trivial_predictors
from lightning_plugins.models.panoramic_depth.evaluation import score
from lightning_plugins.models.panoramic_depth.metrics import PRESETS


def distribution(rooms: RenderedRooms) -> list[dict[str, object]]:
    """Return a row per property: how training and held-out rooms are drawn, and what comes out."""
    drawn = [asdict(TRAINING_ROOMS), asdict(HELD_OUT_ROOMS)]
    rows: list[dict[str, object]] = [{"property": key, "training": drawn[0][key], "held_out": drawn[1][key]} for key in drawn[0]]
    splits = [rooms.rooms("train"), rooms.rooms("test")]
    quantiles = [np.quantile(split.depth_m[split.mask], (0.05, 0.5, 0.95)) for split in splits]
    for i, name in enumerate(("depth_5_percent_m", "depth_median_m", "depth_95_percent_m")):
        rows.append(
            {"property": name, **{k: round(float(q[i]), 3) for k, q in zip(("training", "held_out"), quantiles, strict=True)}}
        )
    for name, figure in (
        ("rooms", lambda s: len(s.mask)),
        ("valid_share", lambda s: round(float(s.mask.mean()), 4)),
        ("beyond_10_m_share", lambda s: round(float((s.depth_m[s.mask] > 10).mean()), 4)),
        ("mean_brightness", lambda s: round(float(s.image.mean()) / 255, 4)),
    ):
        rows.append({"property": name, "training": figure(splits[0]), "held_out": figure(splits[1])})
    return rows


def expand(depth_m: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Return the same depth for each image of a batch."""
    return depth_m.expand(len(image), 1, *depth_m.shape)


def main() -> None:
    """Print and write both tables, for the rooms of the recipe's defaults."""
    rooms = RenderedRooms(train_rooms=1600, test_rooms=128, height=64, seed=0)
    known = rooms.rooms("train")
    predictors = {
        name: partial(expand, torch.from_numpy(depth_m))
        for name, depth_m in trivial_predictors(known.depth_m, known.mask).items()
    }
    rows = distribution(rooms)
    scores = [row for preset in PRESETS for row in score(predictors, rooms.evaluation_dataloader(), preset)]
    for row in rows:
        print(f"{row['property']:28} {row['training']!s:44} {row['held_out']}")
    for row in scores:
        print("  ".join(f"{value:.4f}" if isinstance(value, float) else f"{value!s:16}" for value in row.values()))
    print(write_results("held_out_rooms", rows))
    print(write_results("trivial_predictors", scores))


if __name__ == "__main__":
    main()
