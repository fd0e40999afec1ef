"""Panoramic upright adjustment as a LightningModule: when what the other files of this folder compute is computed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_plugins._lightning import LIGHTNING_VERSION, LightningModule, built_for
from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.sphere import resize_equirectangular, rotation_from_up
from lightning_plugins.models.checkpoint import save_deployed
from lightning_plugins.models.panoramic_upright.lookup_table import AnalyticLookupTable, LearnedLookupTable, fit_lookup_table
from lightning_plugins.models.panoramic_upright.network import UpEstimate, UprightNetwork, unit_up
from lightning_plugins.models.panoramic_upright.orientation import (
    OrientationNetwork,
    expected_error_deg,
    von_mises_fisher_loss,
)
from lightning_plugins.models.panoramic_upright.reconstruction import PatchDiscriminator, UprightReconstruction
from lightning_plugins.models.panoramic_upright.reconstruction_losses import (
    adversarial_loss,
    discriminator_loss,
    edge_loss,
    reconstruction_l1,
)
from lightning_plugins.models.panoramic_upright.validation import UprightFigures
from lightning_plugins.models.photograph import check_photograph

WIDTHS = [48, 96, 128]
LOOKUP_TABLES = ("analytic", "learned")
# A fitted table is nearly exact, and noise in the gradients moves it away: with 128 rows in 80 steps from 0.010 to 0.016 degrees,
# with ten times this share to 0.054.
TABLE_LEARNING_RATE_SHARE = 0.001


class PanoramicUpright(LightningModule):
    """Finds up in an equirectangular image, and levels it: orientation, lookup table and reconstruction in one network.

    Batches are dicts with ``image`` ``(B, 3, H, W)`` in [0, 1] and ``up`` ``(B, 3)``, unit vectors in the camera's frame, and
    with ``reconstruct`` ``level`` ``(B, 3, H, W)``: the true level image in the frame that ``rotation_from_up(up)`` gives. H is
    ``image_height`` or a multiple of it. The reconstruction is trained with the true angle: what a wrong angle costs is no blur,
    and it could only learn to smear. One of the two images should be made from the other by rotation: between two photographs the
    noise differs by more than reading between pixels blurs. ``RenderedRooms(with_level=True)`` gives such pairs.

    With ``reconstruct=False`` optimization is automatic: ``Trainer(gradient_clip_val=..., accumulate_grad_batches=...)`` works as
    ever. With ``reconstruct=True`` it is manual, since there is a second optimizer where the discriminator is
    (``adversarial_weight`` above 0). Lightning then refuses the Trainer's two options, which are options here, and its
    ``global_step`` counts the steps of both optimizers: ``max_steps`` and ``every_n_train_steps`` must be twice as large. Epochs,
    logging and the learning rates' schedule are not touched by that. A discriminator in several processes needs
    ``Trainer(strategy="ddp_find_unused_parameters_true")``: in each optimizer's turn the other's weights rest.

    Paper: Chen, Li, Li, arXiv 2304.05556; what its abstract leaves open is a choice here.

    Args:
        widths: channels of the orientation network after each halving of its histograms.
        blocks: its residual blocks at the coarsest size.
        image_height: rows of the images in which up is looked for; photographs are resized to them.
        refine_steps: how often the image is levelled and looked at again; the surest estimate stands. Not in training. Two steps
            help where tilts are large; where the network was trained on small ones, one look is as good.
        max_expected_error_deg: an estimate that expects to be wrong by more is called unsure, and the image left alone.
        lookup_table: ``analytic``, which is exact, or ``learned``, trained further with the reconstruction; that one serves
            images of ``image_height`` rows, all others go through the exact one.
        reconstruct: refine the level images, with weights that begin as plain resampling.
        edge_weight: factor of the edges' loss beside the L1 loss.
        adversarial_weight: factor of the adversarial loss beside the L1 loss; 0 trains without a discriminator.
        learning_rate: peak of the one-cycle schedule of AdamW.
        reconstruction_learning_rate: the same for the reconstruction and the discriminator.
        weight_decay: of AdamW.
        gradient_clip_norm: largest norm of an optimizer's gradients where optimization is manual; None does not clip.
        accumulate_batches: batches to an optimizer step where optimization is manual.

    Raises:
        InputError: for a value that is out of range or unknown, or that cannot act.
    """

    def __init__(
        self,
        widths: list[int] = WIDTHS,
        blocks: int = 2,
        image_height: int = 128,
        refine_steps: int = 0,
        max_expected_error_deg: float = 15.0,
        lookup_table: str = "analytic",
        reconstruct: bool = False,
        edge_weight: float = 0.5,
        adversarial_weight: float = 0.001,
        learning_rate: float = 6e-3,
        reconstruction_learning_rate: float = 2e-3,
        weight_decay: float = 0.02,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
    ) -> None:
        super().__init__()
        if lookup_table not in LOOKUP_TABLES:
            raise InputError(f"lookup_table has no {lookup_table!r}; {nearest(lookup_table, LOOKUP_TABLES)}")
        orientation = OrientationNetwork(tuple(widths), blocks)
        if image_height % (stride := orientation.stride) or image_height < 1:
            raise InputError(
                f"image_height must be a multiple of {stride} with {len(widths)} widths, got {image_height}; 128 is the default"
            )
        for name, value in (("learning_rate", learning_rate), ("reconstruction_learning_rate", reconstruction_learning_rate)):
            if not value > 0:
                raise InputError(f"{name} must be greater than 0, got {value}; 0.006 and 0.002 are the defaults")
        for name, value, advice in (
            ("refine_steps", refine_steps, "0 estimates once"),
            ("edge_weight", edge_weight, "0 leaves the edges out"),
            ("adversarial_weight", adversarial_weight, "0 trains without a discriminator"),
            ("weight_decay", weight_decay, "0.02 suits the default model"),
        ):
            if not value >= 0:
                raise InputError(f"{name} must be 0 or more, got {value}; {advice}")
        if not 0 < max_expected_error_deg <= 180:
            raise InputError(f"max_expected_error_deg must be in (0, 180], got {max_expected_error_deg}; 15 suits photographs")
        if accumulate_batches < 1:
            raise InputError(f"accumulate_batches must be 1 or more, got {accumulate_batches}; 1 steps after every batch")
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise InputError(f"gradient_clip_norm must be greater than 0, got {gradient_clip_norm}; None does not clip")
        if not reconstruct and (accumulate_batches > 1 or gradient_clip_norm is not None):
            raise InputError(
                f"accumulate_batches and gradient_clip_norm act with reconstruct=True, got {accumulate_batches} and "
                f"{gradient_clip_norm} without; give Trainer(accumulate_grad_batches=..., gradient_clip_val=...) instead"
            )
        self.save_hyperparameters()
        self.automatic_optimization = not reconstruct
        table: AnalyticLookupTable | LearnedLookupTable = AnalyticLookupTable(image_height, 2 * image_height)
        if lookup_table == "learned":
            table = LearnedLookupTable(image_height, 2 * image_height)
            fit_lookup_table(table)
            # It learns with the reconstruction; weights without a gradient would stop DDP.
            table.requires_grad_(reconstruct)
        reconstruction = UprightReconstruction() if reconstruct else None
        self.network = UprightNetwork(orientation, table, reconstruction, image_height, refine_steps)
        self.discriminator = PatchDiscriminator() if reconstruct and adversarial_weight > 0 else None
        self.figures = UprightFigures(refined=reconstruct)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hparams_initial}) [{built_for()}]"

    def forward(self, image: Tensor) -> Tensor:
        """Return ``(B, 3)``: up in the frame of ``engines.sphere``, times how sure it is (the concentration of its distribution).

        The zero vector stands for images of one colour, which have no up.

        Args:
            image: ``(B, 3, H, W)``, sRGB in [0, 1]; H ``image_height`` or a multiple of it, W = 2 H.
        """
        return self.network.estimate(image)

    def _orientation_loss(self, batch: dict[str, Tensor]) -> Tensor:
        _check_batch(batch, ["up", "level"] if self.hparams["reconstruct"] else ["up"])
        loss = von_mises_fisher_loss(self(batch["image"]), batch["up"])
        self.log("panoramic_upright/train_orientation_loss", loss, prog_bar=True)
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.automatic_optimization:
            return self._orientation_loss(batch)
        return self._train_by_hand(batch, (batch_idx + 1) % self.hparams["accumulate_batches"] == 0 or self.trainer.is_last_batch)

    def _train_by_hand(self, batch: dict[str, Tensor], steps_now: bool) -> Tensor:
        optimizers, schedules = _listed(self.optimizers()), _listed(self.lr_schedulers())
        # toggle_model rests the other optimizer's weights, and DDP's synchronization where no step follows.
        with optimizers[0].toggle_model(sync_grad=steps_now):
            loss, refined = self._generator_loss(batch)
            self._descend(loss, optimizers[0], schedules[0], steps_now)
        if self.discriminator is not None:
            with optimizers[1].toggle_model(sync_grad=steps_now):
                scores = self.discriminator(batch["level"]), self.discriminator(refined.detach())
                discriminated = discriminator_loss(*scores)
                self.log("panoramic_upright/train_discriminator_loss", discriminated)
                self._descend(discriminated, optimizers[1], schedules[1], steps_now)
        return loss.detach()

    def _generator_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of orientation and reconstruction, and the refined images."""
        loss = self._orientation_loss(batch)
        assert self.network.reconstruction is not None
        image, level = batch["image"], batch["level"]
        _, refined = self.network.reconstruction(image, self.network.table_for(image, batch["up"]))
        l1 = reconstruction_l1(refined, level)
        self.log("panoramic_upright/train_l1", l1)
        loss = loss + l1 + self.hparams["edge_weight"] * edge_loss(refined, level)
        if self.discriminator is not None:
            adversarial = adversarial_loss(self.discriminator(refined))
            self.log("panoramic_upright/train_adversarial_loss", adversarial)
            loss = loss + self.hparams["adversarial_weight"] * adversarial
        return loss, refined

    def _descend(self, loss: Tensor, optimizer: Any, schedule: Any, steps_now: bool) -> None:
        self.manual_backward(loss / self.hparams["accumulate_batches"])
        if steps_now:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Here and not before the step: mixed precision has unscaled the gradients by now, and callbacks have seen them whole.
        if (largest := self.hparams["gradient_clip_norm"]) is not None:
            self.clip_gradients(optimizer, gradient_clip_val=largest, gradient_clip_algorithm="norm")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _check_batch(batch, ["up"])
        self.figures.update(self.network, batch["image"], batch["up"], batch.get("level"))

    def on_validation_epoch_end(self) -> None:
        self._log_figures("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_figures("test")

    def _log_figures(self, stage: str) -> None:
        for name, figure in self.figures.compute().items():
            self.log(f"panoramic_upright/{stage}_{name}", figure.float(), prog_bar=name == "median_deg")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return ``up`` ``(B, 3)``, ``expected_error_deg`` ``(B,)`` and ``rotation`` ``(B, 3, 3)``, which levels the images."""
        vector = self(batch["image"])
        up = unit_up(vector)
        return {"up": up, "expected_error_deg": expected_error_deg(vector), "rotation": rotation_from_up(up)}

    @torch.no_grad()
    def predict_up(self, image: Tensor) -> UpEstimate:
        """Return where up is in one photograph ``(3, H, W)`` in [0, 1], of any size.

        Raises:
            InputError: if it is not a 2:1 image of floating point numbers.
        """
        check_photograph(image)
        height = self.hparams["image_height"]
        # Turned at twice the size, the image is as sharp for the second look as for the first.
        rows = height * (2 if self.network.refine_steps else 1)
        small = resize_equirectangular(image[None].to(self._like()), rows, 2 * rows)
        with self._evaluating():
            vector = self(small)
        error_deg = float(expected_error_deg(vector))
        return UpEstimate(unit_up(vector)[0], error_deg, error_deg <= self.hparams["max_expected_error_deg"])

    @torch.no_grad()
    def level_panorama(self, image: Tensor, height: int | None = None) -> Tensor:
        """Return one photograph ``(3, H, W)`` in [0, 1] levelled; as it is where the estimate is unsure.

        With a refiner it holds some hundred channels of the result's size at once, 0.8 GB at 1024 x 2048; without one, a tenth.

        Args:
            image: of any size.
            height: rows of the result, twice as wide; by default those of the image.

        Raises:
            InputError: if it is not a 2:1 image of floating point numbers.
        """
        estimate = self.predict_up(image)
        if height is None and not estimate.is_sure:
            return image
        height = image.shape[1] if height is None else height
        resized = resize_equirectangular(image[None].to(self._like()), height, 2 * height)
        if not estimate.is_sure:
            return resized[0]
        with self._evaluating():
            return self.network.level(resized, estimate.up[None]).gated[0]

    def _like(self) -> Tensor:
        """Return a tensor of the model's device and precision."""
        return next(self.network.parameters())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Batch norm must neither see nor learn from a photograph."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def deploy(self, path: str | Path) -> None:
        """Write what inference needs, and nothing of the training: no discriminator and no optimizer. Atomic.

        The file loads with ``load_from_checkpoint(path)`` of this class.
        """
        state = {key: value for key, value in self.state_dict().items() if key.startswith("network.")}
        save_deployed(state, {**self.hparams, "adversarial_weight": 0.0}, LIGHTNING_VERSION, path)

    def configure_optimizers(self) -> Any:
        rate, rate_of_reconstruction = self.hparams["learning_rate"], self.hparams["reconstruction_learning_rate"]
        groups: list[dict[str, Any]] = [{"params": self.network.orientation.parameters(), "lr": rate}]
        if self.network.reconstruction is not None:
            groups.append({"params": self.network.reconstruction.parameters(), "lr": rate_of_reconstruction})
            if table := [*self.network.table.parameters()]:
                share = TABLE_LEARNING_RATE_SHARE * rate_of_reconstruction
                groups.append({"params": table, "lr": share, "weight_decay": 0.0})
        optimizers = [torch.optim.AdamW(groups, weight_decay=self.hparams["weight_decay"])]
        if self.discriminator is not None:
            optimizers.append(torch.optim.AdamW(self.discriminator.parameters(), lr=rate_of_reconstruction, weight_decay=0.0))
        steps = self._optimizer_steps(len(optimizers))
        schedules = [
            OneCycleLR(o, max_lr=[group["lr"] for group in o.param_groups], total_steps=steps, pct_start=0.2, div_factor=10)
            for o in optimizers
        ]
        return optimizers, [{"scheduler": schedule, "interval": "step"} for schedule in schedules]

    def _optimizer_steps(self, optimizers: int) -> int:
        """Return how many steps each optimizer will take."""
        estimated = self.trainer.estimated_stepping_batches
        if not 0 < estimated < math.inf:
            raise InputError(
                f"the learning rates' schedule needs a number of steps, and this Trainer has {estimated}; "
                "give max_epochs or max_steps of 1 or more"
            )
        if self.automatic_optimization:
            return int(estimated)
        # By hand Lightning knows nothing of accumulated batches, and max_steps counts the steps of all optimizers.
        limits = []
        if self.trainer.max_steps > -1:
            limits.append(math.ceil(self.trainer.max_steps / optimizers))
        if (epochs := self.trainer.max_epochs) is not None and epochs > -1 and self.trainer.num_training_batches < math.inf:
            limits.append(epochs * math.ceil(self.trainer.num_training_batches / self.hparams["accumulate_batches"]))
        return min(limits)


def _listed(parts: Any) -> list[Any]:
    """Return what Lightning gives as one thing or as a list, as a list."""
    return parts if isinstance(parts, list) else [parts]


def _check_batch(batch: dict[str, Tensor], needed: list[str]) -> None:
    if missing := [name for name in needed if name not in batch]:
        option = {"up": "tilt='small'", "level": "with_level=True"}[missing[0]]
        raise InputError(
            f"the batches hold {', '.join(batch)}, and no {missing[0]}; give the datamodule {option}, or batches that have it"
        )
