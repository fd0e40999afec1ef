"""Spherical convolution: a circular kernel on the sphere, read by interpolation, then one matrix product.

    y[n] = bias + sum_k W_k x(R_n q_k)                          anisotropic: a weight per point q_k of the kernel
    y[n] = bias + W_0 x(R_n q_0) + sum_r W_r mean_m x(R_n q_rm)      isotropic: a weight per ring

q_0 is the kernel's centre, q_rm point m of ring r, R_n the rotation that carries the north pole to node n (``kernels.py``).
The anisotropic kernel follows the meridians, so it commutes with turns about the vertical alone, on a grid with those by whole
columns; the isotropic one commutes with every rotation, up to interpolation.

Paper: Liu et al., arXiv 2405.16858, for the circular kernel and its transport; we did not have its point counts and radii, so
they are arguments. Related: Coors et al., "SphereNet", ECCV 2018, whose kernel is a square in the tangent plane.
Cost: that of a planar convolution with as many points, plus one read of the input per interpolation weight.
"""

import copy
import math

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.domains import Domain
from lightning_plugins.engines.sphere.interpolation import Interpolation
from lightning_plugins.engines.sphere.kernels import Rings, kernel_table


class SphericalConv2d(nn.Module):
    """Convolution on a sphere, ``(B, in_channels, *domain.shape) -> (B, out_channels, *domain.shape)``.

    ``weight`` is ``(out_channels, in_channels, terms)``, a term being a point of the kernel, the centre first, then ring by ring;
    or, if isotropic, a whole ring. Nothing that is saved in a checkpoint depends on the domain: weights fit every one.

    Args:
        in_channels: channels read.
        out_channels: channels written.
        domain: where the signal lives.
        rings: ``(count, radius)`` of each ring, the radius in units of the domain's node spacing.
        isotropic: one weight per ring instead of one per point.
        bias: whether to add one.

    Raises:
        InputError: if a ring has no point, or its radius is not between 0 and half a turn.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        domain: Domain,
        rings: Rings = ((8, 1.0),),
        isotropic: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.rings = tuple((int(count), float(radius)) for count, radius in rings)
        self.isotropic = isotropic
        terms = 1 + (len(self.rings) if isotropic else sum(count for count, _ in self.rings))
        self._set_domain(domain, terms)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, terms))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as Conv2d does: uniform within 1 / sqrt(fan in)."""
        bound = 1 / math.sqrt(self.in_channels * self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def spacing_rad(self) -> float:
        """The angle that a radius of 1 stands for."""
        return self.domain.spacing_rad

    def with_domain(self, domain: Domain) -> "SphericalConv2d":
        """Return this convolution on another domain, with the very same weight and bias."""
        kept = (*self.parameters(), self.interpolation, self.domain)
        other = copy.deepcopy(self, {id(part): part for part in kept})
        other._set_domain(domain, self.weight.shape[2])
        other.interpolation.to(self.weight)
        return other

    def _set_domain(self, domain: Domain, terms: int) -> None:
        self.domain = domain
        self.interpolation = Interpolation(
            *kernel_table(domain, self.rings, self.isotropic), (domain.node_count * terms, domain.node_count)
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.domain}, rings={self.rings}, isotropic={self.isotropic}, "
            f"bias={self.bias is not None}"
        )

    def forward(self, values: Tensor) -> Tensor:
        if values.shape[1:] != (self.in_channels, *self.domain.shape):
            shape = ", ".join(map(str, (self.in_channels, *self.domain.shape)))
            raise InputError(
                f"this SphericalConv2d reads (B, {shape}), got {tuple(values.shape)}; with_domain() makes one for another size"
            )
        # Conv2d refuses values of another precision than its weights; here the higher one computes, and the values' is returned.
        dtype = torch.promote_types(values.dtype, self.weight.dtype)
        kernel = self.weight.permute(2, 1, 0).flatten(0, 1).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        table = values.flatten(2).transpose(1, 2).contiguous()
        # Image by image: what was read for one still lies in the cache when it is multiplied; for a batch it would not.
        results = []
        for image in table.unbind():
            terms = self.interpolation(image).to(dtype).view(self.domain.node_count, -1)
            results.append(terms @ kernel if bias is None else torch.addmm(bias, terms, kernel))
        result = torch.stack(results).transpose(1, 2)
        if dtype != values.dtype:
            result = result.to(values.dtype)
        # Signals on points keep their channels last in memory, as the next layer reads them; images go to planar convolutions.
        return result.contiguous().unflatten(2, self.domain.shape) if len(self.domain.shape) == 2 else result
