"""The loggers of a recipe: one CSV per phase and attempt, merged at the end, and one W&B run over all phases."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from lightning_plugins._lightning import CSVLogger, Logger, WandbLogger
from lightning_plugins._support.optional import is_installed, require
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.reporting.tables import merge_metrics


class RunLoggers:
    """The loggers of one run.

    Args:
        run: the run's folder; CSV files go to ``logs/``, W&B's to ``wandb/``.
        mode: of W&B: ``offline``, ``online`` or ``disabled``. Without the package, offline means disabled, with a warning.

    Raises:
        ImportError: if W&B was asked for by name (``online``) and is not installed.
    """

    def __init__(self, run: RunFolder, mode: str) -> None:
        self.run = run
        self.wandb: WandbLogger | None = None
        if mode == "online":
            require("wandb")
        if mode == "offline" and not is_installed("wandb"):
            warnings.warn(
                "wandb is not installed, so this run leaves no W&B run; pip install -e '.[wandb]', or --wandb disabled",
                stacklevel=2,
            )
        elif mode != "disabled":
            # The same id after a resume: online, W&B goes on with the run; offline each attempt leaves a folder of its own, and
            # `wandb sync` uploads those of one id to one run, in the order of their start.
            identity = hashlib.sha256(str(run.path).encode()).hexdigest()[:8]
            name = f"{run.path.parent.name}/{run.path.name}"
            self.wandb = WandbLogger(
                name=name, save_dir=run.path, project="lightning_plugins", offline=mode == "offline", id=identity, resume="allow"
            )

    def of_phase(self, phase: str) -> list[Logger]:
        """Return the loggers of one phase; its CSV file is a new one at each attempt."""
        attempt = len(self._files(phase))
        csv = CSVLogger(self.run.path, name="logs", version=f"{phase}-{attempt}")
        return [csv, self.wandb] if self.wandb else [csv]

    def merge(self, phases: list[str]) -> list[dict[str, str]]:
        """Write ``metrics.csv`` from what all attempts of ``phases`` logged, and return its rows."""
        return merge_metrics({phase: self._files(phase) for phase in phases}, self.run.path / "metrics.csv")

    def show(self, scores: list[dict[str, Any]], pictures: dict[str, bytes], of: str = "depth") -> None:
        """Put the evaluation and pictures (PNG by caption) of something into the W&B run, and end it."""
        if self.wandb is None:
            return
        self.wandb.log_table("evaluation", columns=list(scores[0]), data=[list(row.values()) for row in scores])
        if pictures:
            image = require("PIL.Image")
            from io import BytesIO

            opened = [image.open(BytesIO(png)) for png in pictures.values()]
            self.wandb.log_image(of, opened, caption=list(pictures))
        self.wandb.experiment.finish()

    def _files(self, phase: str) -> list[Path]:
        count = len(list((self.run.path / "logs").glob(f"{phase}-*")))
        return [self.run.path / "logs" / f"{phase}-{attempt}" / "metrics.csv" for attempt in range(count)]
