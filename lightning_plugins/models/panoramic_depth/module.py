"""Panoramic depth as LightningModules: when what ``network``, ``losses`` and ``metrics`` compute is computed."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_plugins._lightning import LIGHTNING_VERSION, LightningModule, built_for
from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.sphere import resize_equirectangular
from lightning_plugins.models.checkpoint import load_module, save_deployed
from lightning_plugins.models.panoramic_depth.fusion import saturated_share
from lightning_plugins.models.panoramic_depth.losses import DEPTH_LOSSES, DISTANCES, distillation
from lightning_plugins.models.panoramic_depth.metrics import DepthMetrics
from lightning_plugins.models.panoramic_depth.network import StudentNetwork, TeacherNetwork
from lightning_plugins.models.photograph import check_photograph

WIDTHS = [16, 32, 48, 64, 96]


class ModuleWithDepth(LightningModule):
    """What teacher and student share: validation, the optimizer, and refusing bad learning rates."""

    network: StudentNetwork | TeacherNetwork
    method: str  # first half of the log keys

    def __init__(self, depth_loss: str, learning_rate: float, weight_decay: float, preset: str) -> None:
        super().__init__()
        if depth_loss not in DEPTH_LOSSES:
            raise InputError(f"depth_loss must name a loss of depth, got {depth_loss!r}; {nearest(depth_loss, DEPTH_LOSSES)}")
        if not learning_rate > 0:
            raise InputError(f"learning_rate must be greater than 0, got {learning_rate}; 0.002 suits the default model")
        if weight_decay < 0:
            raise InputError(f"weight_decay must be 0 or more, got {weight_decay}; 0.01 suits the default model")
        self.depth_loss = DEPTH_LOSSES[depth_loss]
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.metrics = DepthMetrics(preset)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hparams_initial}) [{built_for()}]"

    def predict_depth(self, batch: dict[str, Tensor]) -> Tensor:
        """Return depth in metres ``(B, 1, H, W)``: the teacher's from depth and mask, the student's from the image."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        prediction = self.predict_depth(batch)
        self.metrics.update(prediction, batch["depth"], batch["mask"])
        return {"image": batch["image"], "depth": batch["depth"], "mask": batch["mask"], "prediction": prediction}

    def on_validation_epoch_end(self) -> None:
        figures = self.metrics.compute()
        self.metrics.reset()
        for name, figure in figures.items():
            unit = "_m" if name in ("mae", "rmse") else ""
            self.log(f"{self.method}/val_{name}{unit}", figure.float(), prog_bar=name == "abs_rel")

    def deploy(self, path: str | Path) -> None:
        """Write what inference needs, and nothing of the training: no teacher, adapters or optimizer. Atomic.

        The file loads with ``load_from_checkpoint(path)`` of this class.
        """
        state = {key: value for key, value in self.state_dict().items() if key.startswith("network.")}
        save_deployed(state, self.hparams, LIGHTNING_VERSION, path)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise InputError(
                f"the learning rate's schedule needs a number of steps, and this Trainer has {steps}; "
                "give max_epochs or max_steps of 1 or more"
            )
        schedule = OneCycleLR(optimizer, max_lr=self.learning_rate, total_steps=int(steps), pct_start=0.2, div_factor=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DepthTeacher(ModuleWithDepth):
    """Autoencoder of depth with its validity mask; its latent features teach ``PanoramicDepth``.

    Batches are dicts with ``depth`` in metres ``(B, 1, H, W)`` and ``mask`` ``(B, 1, H, W)``, True where depth is valid.
    Paper: Liu et al., arXiv 2405.16858.

    Args:
        widths: channels of the latent pyramid at strides 2, 4, 8, 16 and 32; the student's must be the same.
        head: depth head, ``exponential`` or ``sigmoid``.
        max_depth_m: range of the depth head in metres.
        depth_loss: ``berhu`` (of metres, the paper's) or ``berhu_log`` (of their logarithms).
        learning_rate: peak of the one-cycle schedule of AdamW.
        weight_decay: of AdamW.
        preset: evaluation protocol of the validation metrics.

    Raises:
        InputError: for a value that is out of range or unknown.
    """

    method = "depth_teacher"
    network: TeacherNetwork

    def __init__(
        self,
        widths: list[int] = WIDTHS,
        head: str = "exponential",
        max_depth_m: float = 10.0,
        depth_loss: str = "berhu",
        learning_rate: float = 4e-3,
        weight_decay: float = 0.01,
        preset: str = "unifuse",
    ) -> None:
        super().__init__(depth_loss, learning_rate, weight_decay, preset)
        self.save_hyperparameters()
        self.network = TeacherNetwork(check_widths(widths), head, max_depth_m)

    def forward(self, depth: Tensor, mask: Tensor) -> Tensor:
        """Return the reconstructed depth in metres, ``(B, 1, H, W)``."""
        return self.network(depth, mask)

    def predict_depth(self, batch: dict[str, Tensor]) -> Tensor:
        return self(batch["depth"], batch["mask"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.depth_loss(self.predict_depth(batch), batch["depth"], batch["mask"])
        self.log(f"{self.method}/train_loss", loss, prog_bar=True)
        return loss


class PanoramicDepth(ModuleWithDepth):
    """Depth in metres from one equirectangular image: an equirectangular and a spherical branch, fused, taught by depth itself.

    Batches are dicts with ``image`` ``(B, 3, H, W)`` in [0, 1], and for training ``depth`` in metres and ``mask``, both
    ``(B, 1, H, W)``. Paper: Liu et al., arXiv 2405.16858; what its text leaves open is a choice here.

    Args:
        backbone: any timm model that gives features at strides 2 to 32, by name.
        backbone_options: further arguments of that model, such as ``channels`` of a ResNet.
        pretrained: start the backbone from timm's weights; needs network access once.
        widths: channels of the feature pyramid at strides 2, 4, 8, 16 and 32.
        sphere_widths: channels of the spherical branch at strides 4, 8 and 16; ``[]`` leaves the branch out.
        fusion: ``band_gated``, ``squeeze_excite`` or ``concat``.
        head: ``exponential`` or ``sigmoid``.
        max_depth_m: range of the depth head in metres.
        image_height: rows of the images that it is trained on; photographs are resized to them.
        teacher: checkpoint of a trained ``DepthTeacher``; without one there is no distillation. Needed for training only.
        distance: between the student's and the teacher's features: ``l1``, ``cosine`` or ``affinity``.
        distillation_weight: factor of that distance in the loss.
        decoder_from_teacher: start the decoder from the teacher's.
        depth_loss: ``berhu`` (of metres, the paper's) or ``berhu_log`` (of their logarithms).
        learning_rate: peak of the one-cycle schedule of AdamW.
        weight_decay: of AdamW.
        preset: evaluation protocol of the validation metrics.

    Raises:
        InputError: for a value that is out of range or unknown, or a teacher that cannot be read.
    """

    method = "panoramic_depth"
    network: StudentNetwork

    def __init__(
        self,
        backbone: str = "resnet10t",
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        widths: list[int] = WIDTHS,
        sphere_widths: list[int] = [24, 48, 64],  # noqa: B006 - never mutated; jsonargparse shows it in the YAML
        fusion: str = "band_gated",
        head: str = "exponential",
        max_depth_m: float = 10.0,
        image_height: int = 64,
        teacher: str | None = None,
        distance: str = "l1",
        distillation_weight: float = 1.0,
        decoder_from_teacher: bool = True,
        depth_loss: str = "berhu",
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        preset: str = "unifuse",
    ) -> None:
        super().__init__(depth_loss, learning_rate, weight_decay, preset)
        if distance not in DISTANCES:
            raise InputError(f"distance must name a distance of features, got {distance!r}; {nearest(distance, DISTANCES)}")
        if distillation_weight < 0:
            raise InputError(f"distillation_weight must be 0 or more, got {distillation_weight}; 0 switches the teacher off")
        self.save_hyperparameters()
        self.teacher_path = teacher if distillation_weight > 0 else None
        self.distance = DISTANCES[distance]
        self.network = StudentNetwork(
            backbone,
            backbone_options,
            pretrained,
            check_widths(widths),
            check_sphere_widths(sphere_widths),
            fusion,
            head,
            max_depth_m,
        )
        self.adapters = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths) if self.teacher_path else None
        # In a tuple, so that torch does not register it: a frozen teacher belongs in no checkpoint and no optimizer.
        self._teacher: tuple[TeacherNetwork] | None = None

    def setup(self, stage: str) -> None:
        if stage != "fit" or self.teacher_path is None or self._teacher is not None:
            return
        loaded = load_module(DepthTeacher, self.teacher_path)
        teacher = loaded.network.eval().requires_grad_(False)
        if (ours := list(self.hparams["widths"])) != (theirs := list(loaded.hparams["widths"])):
            raise InputError(f"teacher {self.teacher_path} has widths {theirs}, the student {ours}; they must be the same")
        self._teacher = (teacher,)
        if self.hparams["decoder_from_teacher"]:
            self.network.decoder.load_state_dict(teacher.decoder.state_dict())

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            like = self._like()
            self._teacher[0].to(like.device, like.dtype)

    def _like(self) -> Tensor:
        """Return a tensor of the model's device and precision."""
        return next(self.network.parameters())

    def forward(self, image: Tensor) -> Tensor:
        """Return depth in metres ``(B, 1, H, W)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        return self.network(image)

    def predict_depth(self, batch: dict[str, Tensor]) -> Tensor:
        return self(batch["image"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        depth_m, mask = batch["depth"], batch["mask"]
        pyramid = self.network.pyramid(batch["image"])
        loss = self.depth_loss(self.network.decode(pyramid), depth_m, mask)
        if self._teacher is not None:
            assert self.adapters is not None
            self.log(f"{self.method}/train_depth_loss", loss)
            adapted = [adapter(features) for adapter, features in zip(self.adapters, pyramid, strict=True)]
            taught = distillation(adapted, self._teacher[0].pyramid(depth_m, mask), mask, self.distance)
            self.log(f"{self.method}/train_distillation_loss", taught)
            loss = loss + self.hparams["distillation_weight"] * taught
        self.log(f"{self.method}/train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if (saturated := saturated_share(self.network)) is not None:
            self.log(f"{self.method}/val_gates_saturated_share", saturated)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if (height := batch["image"].shape[-2]) != self.hparams["image_height"]:
            warnings.warn(
                f"PanoramicDepth was trained on images of {self.hparams['image_height']} rows and gets {height}; "
                "its depths will be off",
                stacklevel=2,
            )
        return self.predict_depth(batch)

    @torch.no_grad()
    def predict_panorama(self, image: Tensor) -> Tensor:
        """Return the depth in metres ``(H, W)`` of one photograph ``(3, H, W)`` in [0, 1], of any size.

        Raises:
            InputError: if it is not a 2:1 image of floating point numbers.
        """
        check_photograph(image)
        height = self.hparams["image_height"]
        small = resize_equirectangular(image[None].to(self._like()), height, 2 * height)
        was_training = self.training
        self.eval()  # batch norm must neither see nor learn from a photograph
        log_depth = self.network(small).log()
        self.train(was_training)
        return resize_equirectangular(log_depth, *image.shape[-2:]).exp()[0, 0]


def check_widths(widths: list[int]) -> tuple[int, ...]:
    """Return the widths as a tuple, refusing what is not five positive channels."""
    if len(widths) != 5 or min(widths) < 1:
        raise InputError(f"widths must be five channel counts for strides 2 to 32, got {widths}; the default is {WIDTHS}")
    return tuple(widths)


def check_sphere_widths(widths: list[int]) -> tuple[int, ...]:
    """Return the widths as a tuple, refusing more scales than can be fused, and empty ones."""
    if len(widths) > 4 or any(width < 1 for width in widths):
        raise InputError(
            f"sphere_widths must be up to four channel counts for strides 4, 8, 16, 32, got {widths}; [] leaves the branch out"
        )
    return tuple(widths)
