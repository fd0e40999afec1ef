"""The spherical branch: the image on near-uniform points, where a kernel covers the same solid angle everywhere.

The image is read once, at the points of stride 4; each stage convolves and moves on to a quarter of the points. A scale has
as many points as keep the spacing of its equirectangular grid at the equator: 36 % fewer than pixels, and none crowded at the
poles. Results are carried to the grids for the fusion. Paper: Liu et al., arXiv 2405.16858; lattice and kernel are open there.
Ours are latitude rings, which keep the symmetry that rolls of the image by the network's stride have, and a hexagonal ring.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.engines.sphere import Resample, SpherePoints, SphericalConv2d, latitude_rings

# Rolling the image by this many columns rolls the result.
COARSEST_STRIDE = 32


class SphereBranch(nn.Module):
    """Features of an image at strides 4, 8, 16 ..., computed on the sphere.

    The index tables belong to one image size and are made anew when another size comes; the weights fit every size.

    Args:
        image_channels: channels of the image.
        widths: channels of each scale.
        rings: the kernel, as ``(points, radius in node spacings)``.
    """

    def __init__(self, image_channels: int, widths: tuple[int, ...], rings: tuple[tuple[int, float], ...] = ((6, 1.0),)) -> None:
        super().__init__()
        channels = (image_channels, *widths)
        anywhere = SpherePoints(latitude_rings(4))
        self.convolutions = nn.ModuleList(SphericalConv2d(a, b, anywhere, rings=rings, bias=False) for a, b in pairwise(channels))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in channels[1:])
        self.size = (0, 0)
        self.to_sphere: Resample
        self.pools = nn.ModuleList()
        self.to_grids = nn.ModuleList()

    def set_size(self, height: int, width: int) -> None:
        """Make the tables for images of ``height`` x ``width``."""
        like = next(self.norms.parameters())
        turns = width // COARSEST_STRIDE
        scales = [SpherePoints(latitude_rings(height // stride, turns)) for stride in self.strides()]
        self.convolutions = nn.ModuleList(
            convolution.with_domain(points)
            for convolution, points in zip(self.convolutions, scales, strict=True)
            if isinstance(convolution, SphericalConv2d)
        ).to(like.device, like.dtype)
        self.to_sphere = Resample.grid_to_points(height // 4, width // 4, scales[0].directions()).to(like.device, like.dtype)
        self.pools = nn.ModuleList(
            Resample.points_to_points(fine.directions(), coarse.directions()) for fine, coarse in pairwise(scales)
        ).to(like.device, like.dtype)
        self.to_grids = nn.ModuleList(
            Resample.points_to_grid(p.directions(), height // s, width // s) for p, s in zip(scales, self.strides(), strict=True)
        ).to(like.device, like.dtype)
        self.size = (height, width)

    def strides(self) -> list[int]:
        """Return the stride of each stage."""
        return [2 ** (stage + 2) for stage in range(len(self.convolutions))]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return ``(B, widths[s], H / stride, W / stride)`` for strides 4, 8, 16 ... of ``(B, image_channels, H, W)``."""
        if tuple(image.shape[-2:]) != self.size:
            self.set_size(*image.shape[-2:])
        features, results = self.to_sphere(F.avg_pool2d(image, 4)), []
        for stage, to_grid in enumerate(self.to_grids):
            features = self._stage(stage, self.pools[stage - 1](features) if stage else features)
            results.append(to_grid(features))
        return results

    def _stage(self, stage: int, features: Tensor) -> Tensor:
        return torch.relu(self.norms[stage](self.convolutions[stage](features)))
