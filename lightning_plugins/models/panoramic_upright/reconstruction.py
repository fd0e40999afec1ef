"""The level image: read from the tilted one through its table, and what the reading blurs put back.

    plain   = tilted[table]       (bicubic)
    shallow = S(tilted)[table]    (two convolutions, read bilinearly)
    a, b    = 4 f (1 - f)         of the fractions f by which the table reads beside pixel centres, across and down
    refined = plain + F(plain, shallow, a shallow, b shallow, a, b)           F ends in zeros: it begins as plain resampling

Reading between pixels blurs, and that is all there is to recover: an error of the angle costs far more, and no refiner sees it.
The blur is a derivative times a polynomial in f that is 0 on the pixels (for linear reading, f (1 - f) / 2 times the second one):
S can give derivatives, a and b tell where they are missing. Without a and b the refiner smooths noise as well; that pleases PSNR,
but the gate cannot confirm it.

``refined_is_nearer`` decides per image at inference, from the tilted image alone: both candidates are turned back and compared
with it. What was read too soft comes back softer still, what was invented does not come back at all.

Paper: Chen, Li, Li, arXiv 2304.05556: "reconstructed from shallow features by a light GAN". We had its abstract only; the layers,
the residual on top of plain resampling and the gate are ours.
"""

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere import (
    directions_to_pixels,
    pixel_directions,
    rotation_from_up,
    sample_equirectangular,
    solid_angles,
    wrap_convolutions,
)

# Every other row and column: a quarter of the cost, and still thousands of pixels to compare.
GATE_STRIDE = 2
# Trained refiners that helped came back with 0.75 to 0.96 of the plain image's squared error, on held-out rooms and photographs.
GATE_MARGIN = 0.02


class UprightReconstruction(nn.Module):
    """Level images from tilted ones and their lookup tables; convolutions wrap.

    Args:
        features: channels of the shallow features.
        hidden: channels of the refiner.
    """

    def __init__(self, features: int = 8, hidden: int = 16) -> None:
        super().__init__()
        if features < 1 or hidden < 1:
            raise InputError(f"features and hidden must be 1 or more channels, got {features} and {hidden}; 8 and 16 are light")
        self.shallow = nn.Sequential(
            nn.Conv2d(3, features, 3, padding=1), nn.SiLU(inplace=True), nn.Conv2d(features, features, 3, padding=1)
        )
        # SiLU: with so few channels and so small a residual, a run with ReLU died before it had learned anything.
        last = nn.Conv2d(hidden, 3, 3, padding=1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.refine = nn.Sequential(
            nn.Conv2d(3 + 3 * features + 2, hidden, 3, padding=1),
            nn.SiLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.SiLU(inplace=True),
            last,
        )
        wrap_convolutions(self)

    def forward(self, tilted: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the level image as plain resampling gives it, and refined.

        Args:
            tilted: ``(B, 3, H, W)``, sRGB in [0, 1]; W even.
            table: ``(B, h, w, 3)``, from an ``AnalyticLookupTable`` or a ``LearnedLookupTable``.

        Returns:
            Two images ``(B, 3, h, w)``, not clamped to [0, 1]: that would stop gradients.
        """
        plain = resample_plainly(tilted, table)
        shallow = sample_equirectangular(self.shallow(tilted - 0.5), table)
        beside = directions_to_pixels(table, *tilted.shape[2:]).movedim(-1, 1).frac()
        # Pixels to the left of the first column's centre have negative fractions; all count from 0 to 1.
        beside = 4 * beside.abs() * (1 - beside.abs())
        seen = torch.cat([plain - 0.5, shallow, beside, shallow * beside[:, :1], shallow * beside[:, 1:]], dim=1)
        return plain, plain + self.refine(seen)


def resample_plainly(tilted: Tensor, table: Tensor) -> Tensor:
    """Return the level image ``(B, 3, h, w)`` by bicubic resampling through a table ``(B, h, w, 3)``."""
    return sample_equirectangular(tilted, table, "bicubic")


def refined_is_nearer(tilted: Tensor, up: Tensor, plain: Tensor, refined: Tensor, margin: float = GATE_MARGIN) -> Tensor:
    """Tell for each image whether the refined candidate, turned back, is nearer to the tilted image than the plain one.

    Args:
        tilted: ``(B, 3, H, W)``, what both were made from.
        up: ``(B, 3)``, what both were levelled with; it need not be right.
        plain: ``(B, 3, h, w)``.
        refined: ``(B, 3, h, w)``.
        margin: share of the plain candidate's squared error by which the refined one's must be smaller.

    Returns:
        ``(B,)``, bool.
    """
    directions = pixel_directions(*tilted.shape[2:], dtype=up.dtype, device=up.device)[::GATE_STRIDE, ::GATE_STRIDE]
    # Backwards: the tilted image shows in direction d what the level one shows in R d.
    directions = torch.matmul(directions, rotation_from_up(up).mT.unsqueeze(-3))
    both = torch.cat([plain, refined], dim=1).clamp(0, 1)
    seen = tilted[..., ::GATE_STRIDE, ::GATE_STRIDE]
    error = sample_equirectangular(both, directions).unflatten(1, (2, 3)) - seen.unsqueeze(1)
    weight = solid_angles(*tilted.shape[2:], dtype=error.dtype, device=error.device)[::GATE_STRIDE]
    plain_error, refined_error = torch.matmul(error.square().mean(dim=(2, 4)), weight).unbind(-1)
    return refined_error < (1 - margin) * plain_error


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches of 18 x 18 pixels: 1 where they look like a camera's, 0 where like the refiner's.

    Paper: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, with two halvings instead
    of three and without normalisation: interpolation blur is small, and batch statistics would mix the images of a batch.

    Args:
        width: channels of the first layer, doubled by the second.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )
        wrap_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        """Return scores ``(B, 1, H / 4, W / 4)`` of images ``(B, 3, H, W)``; H and W divisible by 4."""
        return self.layers(image - 0.5)
