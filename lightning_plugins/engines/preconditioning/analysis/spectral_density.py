"""The density of a matrix's eigenvalues from its products alone: stochastic Lanczos quadrature.

For a random vector v of signs, Lanczos gives a tridiagonal matrix with eigenpairs ``(theta_k, u_k)`` and

    1/n tr f(A)  =  E_v[v^T f(A) v] / n  ~  mean_v sum_k u_k[0]^2 f(theta_k)

which for one v is exact for polynomials f up to degree ``2 steps - 1`` (Gauss quadrature). The density is drawn with a Gaussian
of a chosen width in the place of each node.

Papers: Golub and Welsch, 1969; Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 2017; Ghorbani et al., ICML 2019 (networks).
Cost: ``probes * steps`` products. Memory: ``steps`` vectors, for full reorthogonalisation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis.operators import LinearOperator, random_columns
from lightning_plugins.engines.preconditioning.settings import check_count, check_positive


@dataclass(frozen=True)
class SpectralDensity:
    """Quadratures of the eigenvalue density, one a probe; the density of all eigenvalues has mass 1.

    Attributes:
        nodes: ``(probes, steps)``; those beyond the end of a Krylov space have no weight.
        weights: ``(probes, steps)``, each row sums to 1.
    """

    nodes: Tensor
    weights: Tensor

    def moment(self, power: int) -> tuple[float, float]:
        """Return ``tr(A^power) / size`` and its standard error over the probes (NaN of one probe)."""
        each = (self.weights * self.nodes**power).sum(1)
        error = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return float(each.mean()), error

    def grid(self, points: int = 512) -> Tensor:
        """Return evenly spaced eigenvalues that hold all nodes, a tenth of their span more on both sides."""
        low, high = self._span()
        margin = 0.1 * (high - low)
        return torch.linspace(low - margin, high + margin, points, dtype=self.nodes.dtype, device=self.nodes.device)

    def density(self, grid: Tensor, width: float | None = None) -> Tensor:
        """Return the density per unit of eigenvalue on a grid, mean over the probes.

        Args:
            grid: eigenvalues, ``(points,)``.
            width: standard deviation of the Gaussian at each node; a hundredth of the nodes' span by default.

        Raises:
            InputError: if the width is not above 0.
        """
        low, high = self._span()
        width = 0.01 * (high - low) if width is None else width
        check_positive("width", width)
        away = (grid[:, None] - self.nodes.flatten()) / width
        gaussians = torch.exp(-0.5 * away.square()) / (width * math.sqrt(2.0 * math.pi))
        return gaussians @ self.weights.flatten() / len(self.nodes)

    def _span(self) -> tuple[float, float]:
        nodes = self.nodes[self.weights > 0]
        low, high = float(nodes.min()), float(nodes.max())
        return (low, high) if high > low else (low, low + max(abs(low), 1.0))


def spectral_density(
    operator: LinearOperator, *, probes: int = 8, steps: int = 64, generator: torch.Generator | None = None
) -> SpectralDensity:
    """Estimate the density of an operator's eigenvalues.

    Args:
        operator: symmetric.
        probes: random vectors; the error of smooth averages falls with their square root.
        steps: Lanczos steps, the nodes of each quadrature; at most the operator's size are taken.
        generator: of the random vectors; None is torch's own.

    Raises:
        InputError: if ``probes`` or ``steps`` is below 1, or a product is not finite.
    """
    check_count("probes", probes)
    check_count("steps", steps)
    steps = min(steps, operator.size)
    starts = random_columns(operator, probes, generator, signs=True)
    quadratures = [_quadrature(operator, start, steps) for start in starts.mT]
    return SpectralDensity(*(torch.stack(parts) for parts in zip(*quadratures, strict=True)))


def _quadrature(operator: LinearOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the nodes and weights of one probe, each ``(steps,)``; both are 0 beyond the end of its Krylov space."""
    diagonal, beside = _tridiagonal(operator, start, steps)
    matrix = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    nodes, weights = start.new_zeros(steps), start.new_zeros(steps)
    nodes[: len(values)] = values.to(nodes)
    weights[: len(values)] = vectors[0].square().to(nodes)
    return nodes, weights


def _tridiagonal(operator: LinearOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the diagonals of Lanczos' matrix, in float64, shorter where the Krylov space ends before ``steps``."""
    basis = start.new_zeros(steps, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        image = operator.matvec(basis[step].clone())
        diagonal.append(float(image @ basis[step]))
        if not math.isfinite(diagonal[-1]):
            raise InputError("a product of the operator holds NaN or infinity; check the module's parameters and the data")
        scale = float(image.norm())
        for _ in range(2):  # full reorthogonalisation: without it Lanczos finds copies of the outer eigenvalues
            image = image - basis[: step + 1].mT @ (basis[: step + 1] @ image)
        length = float(image.norm())
        if step + 1 == steps or length <= 100 * torch.finfo(start.dtype).eps * scale:
            break
        beside.append(length)
        basis[step + 1] = image / length
    return torch.tensor(diagonal, dtype=torch.float64), torch.tensor(beside, dtype=torch.float64)
