"""The networks of panoramic depth: two branches, their fusion, a decoder; and the teacher, an autoencoder of depth.

    student:  image -> equirectangular branch (any timm backbone) -+-> fusion at each scale -> pyramid -> decoder -> head
                    -> spherical branch (points on the sphere) ----+
    teacher:  depth and mask -> small encoder -> pyramid -> decoder -> head

Paper: Liu et al., arXiv 2405.16858. Both pyramids have the same widths and both decoders the same shape, so that each scale
of the student can be compared with the teacher's after a 1 x 1 adapter, and the student's decoder can start from the teacher's.
Every convolution pads over the seam and the poles, and rolling the image by the coarsest stride rolls the depth exactly.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.optional import require
from lightning_plugins.engines.sphere import limit_longitude_band, pad_equirectangular, pixel_directions, wrap_convolutions
from lightning_plugins.models.panoramic_depth.fusion import build_fusion
from lightning_plugins.models.panoramic_depth.heads import build_head
from lightning_plugins.models.panoramic_depth.sphere_branch import SphereBranch

STRIDES = (2, 4, 8, 16, 32)
IMAGE_CHANNELS = 4  # red, green, blue, height


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Return convolution 3 x 3, batch norm, ReLU; padding is wrapped by the network that holds it."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Decoder(nn.Module):
    """From a pyramid of features, finest (stride 2) first, to one channel at full size.

    Args:
        widths: channels of the pyramid, finest first.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(block(coarse + fine, fine) for fine, coarse in pairwise(widths))
        self.last = block(widths[0], widths[0])
        self.to_depth = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        features = pyramid[-1]
        for step, fine in zip(reversed(self.steps), reversed(pyramid[:-1]), strict=True):
            features = step(torch.cat([_double(features), fine], dim=1))
        # At half size: a convolution at full size costs as much as a stage of the backbone, and four depths a cell leave a grid.
        return limit_longitude_band(_double_smoothly(self.to_depth(self.last(features))))


def _double_smoothly(depth: Tensor) -> Tensor:
    doubled = F.interpolate(pad_equirectangular(depth, 1), scale_factor=2.0, mode="bilinear", align_corners=False)
    return doubled[..., 2:-2, 2:-2]


def _double(features: Tensor) -> Tensor:
    # Nearest, not bilinear: it needs no padding and commutes with rolls.
    return F.interpolate(features, scale_factor=2.0, mode="nearest")


class StudentNetwork(nn.Module):
    """Depth from an equirectangular image.

    Args:
        backbone: name of a timm model that offers ``features_only``.
        backbone_options: further arguments of that model.
        pretrained: start from timm's weights (needs network access once).
        widths: channels of the pyramid at strides 2, 4, 8, 16, 32.
        sphere_widths: channels of the spherical branch at strides 4, 8 and 16; empty for a model without that branch.
        fusion: key of ``FUSIONS``.
        head: key of ``HEADS``.
        max_depth_m: range of the depth head.

    Raises:
        InputError: if the backbone is unknown or does not give the five strides.
    """

    def __init__(
        self,
        backbone: str,
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        widths: tuple[int, ...] = (16, 32, 48, 64, 96),
        sphere_widths: tuple[int, ...] = (24, 48, 64),
        fusion: str = "band_gated",
        head: str = "exponential",
        max_depth_m: float = 10.0,
    ) -> None:
        super().__init__()
        self.grid_branch = build_backbone(backbone, backbone_options or {}, pretrained)
        self.lateral = nn.ModuleList(
            nn.Conv2d(count, width, 1) for count, width in zip(backbone_channels(self.grid_branch), widths, strict=True)
        )
        self.sphere_branch = SphereBranch(IMAGE_CHANNELS, sphere_widths) if sphere_widths else None
        self.fusions = nn.ModuleList(
            build_fusion(fusion, width, s) for width, s in zip(widths[1:], sphere_widths, strict=False)
        )  # the coarsest has none
        self.decoder = Decoder(widths)
        self.head = build_head(head, max_depth_m)
        wrap_convolutions(self)

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Return the fused features at strides 2 to 32, finest first, ``(B, widths[s], H / stride, W / stride)``."""
        check_size(image)
        image = with_height(image)
        features = [lateral(f) for lateral, f in zip(self.lateral, self.grid_branch(image), strict=True)]
        if self.sphere_branch is not None:
            for scale, (fuse, sphere) in enumerate(zip(self.fusions, self.sphere_branch(image), strict=True), start=1):
                features[scale] = fuse(features[scale], sphere)
        return features

    def decode(self, pyramid: list[Tensor]) -> Tensor:
        """Return depth in metres, ``(B, 1, H, W)``."""
        return self.head(self.decoder(pyramid))

    def forward(self, image: Tensor) -> Tensor:
        """Return depth in metres ``(B, 1, H, W)`` of images ``(B, 3, H, W)`` in [0, 1]; H is half of W, W a multiple of 64."""
        return self.decode(self.pyramid(image))


class TeacherNetwork(nn.Module):
    """Autoencoder of depth; its pyramid is what the student is taught.

    Args:
        widths: channels of the pyramid at strides 2, 4, 8, 16, 32; the student's must be the same.
        head: key of ``HEADS``.
        max_depth_m: range of the depth head.
    """

    def __init__(
        self, widths: tuple[int, ...] = (16, 32, 48, 64, 96), head: str = "exponential", max_depth_m: float = 10.0
    ) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(block(a, b, stride=2) for a, b in pairwise((2, *widths)))
        self.decoder = Decoder(widths)
        self.head = build_head(head, max_depth_m)
        wrap_convolutions(self)

    def pyramid(self, depth_m: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the latent features of depth ``(B, 1, H, W)``; what stands at invalid pixels is never read."""
        log_depth = torch.where(mask, depth_m.clamp(min=0.01), 1.0).log()
        features, pyramid = torch.cat([log_depth, mask.to(depth_m.dtype)], dim=1), []
        for step in self.encoder:
            features = step(features)
            pyramid.append(features)
        return pyramid

    def forward(self, depth_m: Tensor, mask: Tensor) -> Tensor:
        """Return the reconstructed depth in metres, ``(B, 1, H, W)``."""
        check_size(depth_m)
        return self.head(self.decoder(self.pyramid(depth_m, mask)))


def build_backbone(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    """Return timm's ``name`` as a pyramid of features at strides 2, 4, 8, 16, 32.

    Raises:
        InputError: if timm does not know the name, refuses an option, or the model has other strides.
    """
    timm = require("timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*")[:3] or ["resnet18", "mobilenetv3_small_100", "convnext_tiny"]
        raise InputError(f"backbone must be a model of timm, got {name!r}; near it are {', '.join(near)}")
    try:
        backbone = timm.create_model(name, pretrained=pretrained, features_only=True, in_chans=IMAGE_CHANNELS, **options)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"timm cannot build {name!r} with features_only and {options}: {error}; choose another backbone or option"
        ) from error
    strides = tuple(backbone.feature_info.reduction())
    if strides != STRIDES:
        raise InputError(f"backbone must give features at strides {STRIDES}, {name!r} gives {strides}; resnet18 is one that fits")
    return backbone


def backbone_channels(backbone: Any) -> list[int]:
    """Return the channels of timm's features at each stride."""
    return list(backbone.feature_info.channels())


def check_size(image: Tensor) -> None:
    """Refuse what is not 2:1 with a width that is a multiple of 64."""
    height, width = image.shape[-2:]
    if width != 2 * height or width % 64:
        near = max(64, round(width / 64) * 64)
        raise InputError(
            f"panoramas must be 2:1 and a multiple of 64 wide, got {width} x {height}; resize to {near} x {near // 2}"
        )


def with_height(image: Tensor) -> Tensor:
    """Append a channel with the z of each pixel's direction, and map all from [0, 1] to about [-2, 2], as backbones expect.

    How far below the horizon a piece of floor lies is what says how far away it is; a convolution alone does not know its row.
    """
    height, width = image.shape[-2:]
    z = pixel_directions(height, width, dtype=image.dtype, device=image.device)[..., 2].expand(len(image), 1, height, width)
    return torch.cat([(image - 0.5) * 4, 2 * z], dim=1)
