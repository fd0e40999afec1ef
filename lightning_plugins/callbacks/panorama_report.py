"""Depth previews and a one-file report as a callback: ``Trainer(callbacks=[PanoramaReport()])``."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_plugins._lightning import Callback, LightningModule, Trainer
from lightning_plugins._support.errors import InputError
from lightning_plugins.reporting.depth_report import ELSEWHERE, Preview, Scale, draw_previews, write_depth_report
from lightning_plugins.reporting.samples import Sample, take_samples
from lightning_plugins.reporting.tables import read_metrics

Predict = Callable[[LightningModule, Any], Mapping[str, Any]]


class PanoramaReport(Callback):
    """Draw the first validation panoramas with their depths after each validation, and write ``report.html`` at the end.

    It reads what ``validation_step`` returns: a dict with ``image`` ``(B, 3, H, W)`` in [0, 1] and ``depth``, ``mask`` and
    ``prediction``, each ``(B, 1, H, W)`` or ``(B, H, W)``, depths in metres. Files: ``previews/epoch_XXX_sample_Y.png`` on a
    scale that stays the same through all epochs, and ``report.html`` with samples, error maps, curves (from a CSVLogger, if
    the trainer has one) and final metrics. Only the first process writes; the sanity check writes nothing.

    Args:
        samples: panoramas to draw, the first ones of the validation data; 0 writes the report without any.
        near_m: depth of the first colour.
        far_m: depth of the last colour.
        every_n_epochs: draw after every n-th epoch; ``trainer.validate`` always draws.
        folder: where to write; the trainer's ``default_root_dir`` if left out.
        predict: called with the module and the batch where ``validation_step`` does not return the dict; returns it. It runs on
            the first process alone, so it must not communicate.
        upload_images: log the previews to a WandbLogger, if the trainer has one.

    Raises:
        InputError: if an option is out of range; before training, if the folder cannot be written; in the first validation
            batch (the sanity check, usually), if the dict is not what it should be.
    """

    def __init__(
        self,
        samples: int = 4,
        near_m: float = 0.0,
        far_m: float = 10.0,
        every_n_epochs: int = 1,
        folder: str | Path | None = None,
        predict: Predict | None = None,
        upload_images: bool = True,
    ) -> None:
        if samples < 0:
            raise InputError(f"samples must be 0 or more, got {samples}; 0 writes the report without pictures")
        if not 0 <= near_m < far_m:
            raise InputError(f"near_m and far_m must satisfy 0 <= near_m < far_m, got {near_m} and {far_m}; rooms fit 0 to 10")
        if every_n_epochs < 1:
            raise InputError(f"every_n_epochs must be 1 or more, got {every_n_epochs}; 1 draws after every epoch")
        if predict is not None and not callable(predict):
            raise InputError(
                f"predict must be a function of the module and the batch, got {type(predict).__name__}; leave it out"
            )
        self.samples = samples
        self.near_m = near_m
        self.far_m = far_m
        self.every_n_epochs = every_n_epochs
        self.folder = None if folder is None else Path(folder)
        self.predict = predict
        self.upload_images = upload_images
        self._taken: list[Sample] = []
        self._previews: list[Preview] = []

    def __repr__(self) -> str:
        predict = None if self.predict is None else getattr(self.predict, "__qualname__", type(self.predict).__name__)
        folder = None if self.folder is None else str(self.folder)
        return (
            f"PanoramaReport(samples={self.samples}, near_m={self.near_m}, far_m={self.far_m}, "
            f"every_n_epochs={self.every_n_epochs}, folder={folder!r}, predict={predict}, upload_images={self.upload_images})"
        )

    @property
    def state_key(self) -> str:
        """Tells two instances apart; there is no state to keep."""
        return repr(self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder, so that one that cannot be written is refused before anything runs."""
        if trainer.is_global_zero and stage in ("fit", "validate"):
            self._forget()
            previews = self._home(trainer) / "previews"
            try:
                previews.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{previews} cannot be made ({error.strerror or error}); {ELSEWHERE}") from error

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first panoramas of the validation data."""
        missing = self.samples - len(self._taken)
        if not trainer.is_global_zero or missing <= 0 or not self._is_due(trainer):
            return
        if self.predict is None:
            source = f"the validation_step of {type(pl_module).__name__}"
        else:
            outputs, source = self.predict(pl_module, batch), "the function given as predict"
        self._taken += take_samples(outputs, missing, source)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was kept; after a bare ``trainer.validate`` write the report too."""
        taken, self._taken = self._taken, []
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if taken:
            self._draw(trainer, taken)
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report."""
        if trainer.is_global_zero:
            self._report(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the pictures: Lightning calls no teardown after a crash."""
        self._forget()

    def _is_due(self, trainer: Trainer) -> bool:
        # The sanity check counts as due: what it refuses, it refuses before the training.
        at_once = trainer.sanity_checking or trainer.state.fn == "validate"
        return at_once or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _home(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) if self.folder is None else self.folder

    def _forget(self) -> None:
        self._taken, self._previews = [], []

    def _draw(self, trainer: Trainer, taken: list[Sample]) -> None:
        folder = self._home(trainer) / "previews"
        self._previews = draw_previews(folder, trainer.current_epoch, taken, Scale(self.near_m, self.far_m))
        paths = [str(preview.path) for preview in self._previews]
        for logger in _loggers(trainer, "WandbLogger") if self.upload_images else []:
            logger.log_image("panorama_report/preview", paths, step=trainer.global_step)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.samples and not self._previews:
            warnings.warn(
                "PanoramaReport saw no validation panorama, so report.html has no samples; give the trainer validation data, "
                f"and train for at least every_n_epochs={self.every_n_epochs} epochs",
                stacklevel=2,
            )
        name = type(pl_module).__name__
        summary = f"{name} after {trainer.current_epoch} epochs and {trainer.global_step} optimizer steps."
        final = {metric: float(value) for metric, value in trainer.callback_metrics.items()}
        scale = Scale(self.near_m, self.far_m)
        path = self._home(trainer) / "report.html"
        write_depth_report(path, f"{name}: depth report", summary, final, _logged(trainer), self._previews, scale)


def _loggers(trainer: Trainer, name: str) -> list[Any]:
    # By name: a Trainer of the other Lightning takes this callback too, and its loggers are other classes.
    return [logger for logger in trainer.loggers if any(kind.__name__ == name for kind in type(logger).__mro__)]


def _logged(trainer: Trainer) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for logger in _loggers(trainer, "CSVLogger"):
        rows += read_metrics(Path(logger.log_dir) / "metrics.csv")
    return rows
