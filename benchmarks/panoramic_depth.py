"""What each part of panoramic depth is worth: the same training with a part taken away, over seeds, all else equal.

    python benchmarks/panoramic_depth.py [--seeds 1] [--epochs 6] [--rooms 1600]

Variants: ``full`` (the recipe), ``no_teacher``, ``random_teacher`` (frozen, never trained), ``no_sphere``, ``squeeze_excite``
and ``concat`` (other fusions), ``berhu_metres`` (the paper's loss). Every variant sees the same rooms in the same order and takes
as many steps. Scores on the held-out rooms go to ``results/panoramic_depth.csv``, with the share of saturated gates.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import yaml
from _results import write_results

from lightning_plugins import DepthTeacher, PanoramicDepth, RenderedRooms
from lightning_plugins._lightning import Trainer, seed_everything
from lightning_plugins.models.panoramic_depth.evaluation import score
from lightning_plugins.models.panoramic_depth.fusion import saturated_share
from lightning_plugins.recipes.targets import shipped_yaml

VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    "no_teacher": {"distillation_weight": 0.0},
    "random_teacher": {},
    "no_sphere": {"sphere_widths": []},
    "squeeze_excite": {"fusion": "squeeze_excite"},
    "concat": {"fusion": "concat"},
    "berhu_metres": {"depth_loss": "berhu"},
}


def train(module: PanoramicDepth | DepthTeacher, rooms: RenderedRooms, epochs: int, seed: int) -> float:
    """Train and return the seconds it took."""
    seed_everything(seed, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    start = time.perf_counter()
    Trainer(max_epochs=epochs, accelerator="auto", devices=1, limit_val_batches=0, **quiet).fit(module, rooms)
    return time.perf_counter() - start


def main() -> None:
    """Train every variant for every seed; print and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--rooms", type=int, default=1600)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    given = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    recipe = yaml.safe_load(shipped_yaml("panoramic_depth").read_text())
    rows = []
    for seed in range(given.seeds):
        rooms = RenderedRooms(train_rooms=given.rooms, seed=seed)
        seed_everything(seed, verbose=False)
        teachers = {"random_teacher": DepthTeacher(**recipe["teacher"]), "full": DepthTeacher(**recipe["teacher"])}
        train(teachers["full"], rooms, given.teacher_epochs, seed)
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{name}.ckpt" for name in teachers}
            for name, teacher in teachers.items():
                teacher.deploy(files[name])
            for variant in given.variants:
                seed_everything(seed, verbose=False)
                options = {**recipe["model"], **VARIANTS[variant], "teacher": str(files.get(variant, files["full"]))}
                student = PanoramicDepth(**options)
                seconds = train(student, rooms, given.epochs, seed)
                student.eval()
                (row,) = score({variant: student}, rooms.evaluation_dataloader(), "unifuse")
                saturated = saturated_share(student.network)
                rows.append(
                    {"seed": seed, **row, "gates_saturated_share": "" if saturated is None else saturated, "training_s": seconds}
                )
                print(
                    {key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True
                )
    print(write_results("panoramic_depth", rows))


if __name__ == "__main__":
    main()
