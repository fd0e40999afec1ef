"""The three parts as one network: where up is, the table, the level image. Plain torch; ``torch.export`` takes it whole."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere import rotation_from_up
from lightning_plugins.models.panoramic_upright.lookup_table import AnalyticLookupTable, LearnedLookupTable
from lightning_plugins.models.panoramic_upright.orientation import OrientationNetwork
from lightning_plugins.models.panoramic_upright.reconstruction import (
    UprightReconstruction,
    refined_is_nearer,
    resample_plainly,
)

# Standard deviation, a step of 8-bit values: below it all that a network could find up from is rounding.
UNIFORM_DEVIATION = 1 / 255


@dataclass(frozen=True)
class UpEstimate:
    """Where up is in one panorama.

    Attributes:
        up: ``(3,)`` unit vector in the frame of ``engines.sphere``; ``rotation_from_up(up)`` levels the image. +z where there is
            no cue at all.
        expected_error_deg: by how many degrees it expects to be wrong; 90 where there is no cue.
        is_sure: whether that is at most what the model was told to accept.
    """

    up: Tensor
    expected_error_deg: float
    is_sure: bool


class Candidates(NamedTuple):
    """Level images ``(B, 3, h, w)`` in [0, 1]: plainly resampled, refined, and which of the two the gate took.

    Attributes:
        plain: bicubic resampling.
        refined: what the refiner made of it; the same image where there is no refiner.
        gated: for each image the one that was taken.
        took_refined: ``(B,)``, bool.
    """

    plain: Tensor
    refined: Tensor
    gated: Tensor
    took_refined: Tensor


class UprightNetwork(nn.Module):
    """Estimates up, makes the table, reads the level image through it.

    Args:
        orientation: finds up.
        table: the table for its size; images of other sizes go through the exact one.
        reconstruction: refines what was read; None leaves plain resampling.
        height: rows of the images that ``orientation`` sees.
        refine_steps: how often the image is levelled and looked at again; the surest of all estimates stands.
    """

    def __init__(
        self,
        orientation: OrientationNetwork,
        table: AnalyticLookupTable | LearnedLookupTable,
        reconstruction: UprightReconstruction | None,
        height: int,
        refine_steps: int = 0,
    ) -> None:
        super().__init__()
        self.orientation = orientation
        self.table = table
        self.reconstruction = reconstruction
        self.height = height
        self.refine_steps = refine_steps

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return up ``(B, 3)``, unit vectors, and the level images ``(B, 3, H, W)`` in [0, 1].

        Args:
            image: ``(B, 3, H, W)``, sRGB in [0, 1]; H the network's ``height`` or a multiple of it, W = 2 H.

        Raises:
            InputError: for another shape.
        """
        up = unit_up(self.estimate(image))
        return up, self.level(image, up).gated

    def estimate(self, image: Tensor) -> Tensor:
        """Return ``(B, 3)``: concentration times up, as ``OrientationNetwork`` does; the zero vector where there is no cue.

        Refining steps are not taken in training: they would train on images that are level but for the network's own errors.
        """
        factor = image.shape[-2] // self.height
        if image.ndim != 4 or image.shape[2:] != (factor * self.height, 2 * factor * self.height):
            raise InputError(
                f"image must have shape (B, 3, k {self.height}, k {2 * self.height}), got {tuple(image.shape)}; "
                "resize_equirectangular resizes it"
            )
        vector = self.look(image)
        for _ in range(0 if self.training else self.refine_steps):
            up = unit_up(vector)
            # Always from the image itself, so that nothing blurs twice.
            seen = self.look(resample_plainly(image, self.table_for(image, up)))
            # In the level frame; v R is R^T v, back in the camera's.
            again = torch.matmul(seen.unsqueeze(1), rotation_from_up(up)).squeeze(1)
            # The longer of the two is the surer one: a wrong turn is not followed.
            surer = again.square().sum(-1, keepdim=True) > vector.square().sum(-1, keepdim=True)
            vector = torch.where(surer, again, vector)
        return vector

    def look(self, image: Tensor) -> Tensor:
        """Return what the orientation network says of images of its size or a multiple; the zero vector for those of one colour.

        Of such an image it sees the latitudes alone, and any direction that it gives is an artefact.
        """
        factor = image.shape[-2] // self.height
        small = F.avg_pool2d(image, factor) if factor > 1 else image
        has_cue = small.std(dim=(2, 3)).amax(dim=1) > UNIFORM_DEVIATION
        return self.orientation(small) * has_cue.unsqueeze(1)

    def level(self, image: Tensor, up: Tensor) -> Candidates:
        """Return the level images of ``(B, 3, H, W)`` at the same size.

        Args:
            image: sRGB in [0, 1], of any size with an even width.
            up: ``(B, 3)``, of any length but zero.
        """
        table = self.table_for(image, up)
        if self.reconstruction is None:
            plain = resample_plainly(image, table).clamp(0, 1)
            return Candidates(plain, plain, plain, torch.zeros(image.shape[0], dtype=torch.bool, device=image.device))
        plain, refined = (candidate.clamp(0, 1) for candidate in self.reconstruction(image, table))
        took_refined = refined_is_nearer(image, up, plain, refined)
        return Candidates(plain, refined, torch.where(took_refined[:, None, None, None], refined, plain), took_refined)

    def table_for(self, image: Tensor, up: Tensor) -> Tensor:
        """Return the table ``(B, H, W, 3)`` that levels images ``(B, 3, H, W)``."""
        height, width = image.shape[2:]
        if (height, width) == (self.table.height, self.table.width):
            return self.table(up)
        # It holds one row and one column of directions: making it costs less than a thousandth of using it.
        return AnalyticLookupTable(height, width).to(up.device, up.dtype)(up)


def unit_up(vector: Tensor) -> Tensor:
    """Return the directions of vectors ``(B, 3)``, and +z, level, for those that are zero."""
    level = torch.tensor([0.0, 0.0, 1.0], dtype=vector.dtype, device=vector.device)
    # In two steps: dividing by a norm of nearly 0 would not give unit vectors.
    return torch.where((vector == 0).all(dim=-1, keepdim=True), level, F.normalize(vector, dim=-1, eps=1e-30))
