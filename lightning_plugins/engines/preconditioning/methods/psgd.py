"""Kron-PSGD: a preconditioner that is fitted, one gradient at a time, until it whitens gradients.

    X = h x_1 Q_1 ... x_k Q_k        Y = v x_1 Q_1^-T ... x_k Q_k^-T        h: gradient, v: standard normal
    E_i = X_(i) X_(i)^T - Y_(i) Y_(i)^T,      Q_i <- Q_i - mu triu(E_i) Q_i / |X_(i) X_(i)^T + Y_(i) Y_(i)^T|
    P = V x_1 Q_1^T Q_1 ... x_k Q_k^T Q_k

Papers: Li, "Preconditioned Stochastic Gradient Descent", 2015; Pooladzandi and Li, "Curvature-Informed SGD via General Purpose
Lie-Group Preconditioners", 2024. The fit minimises ``E[h^T P h + v^T P^-1 v]``, whose minimum over all matrices is the inverse
root of ``E[h h^T]``. The Q are upper triangular and stay so: nothing is inverted, and nothing needs damping. An axis longer than
``max_dim`` has a diagonal Q. The norm that divides is estimated from below, as the authors do, by one product with a long row.
We start from a multiple of the identity that whitens the first gradient on average.

``factor_every`` is the interval between two updates of Q, ``inverse_every`` that between two uses of them: until then ``Q^T Q``
stands. ``P`` has entries of about 1, so learning rates are such as Adam's; momentum belongs to the base optimizer, and
``max_rms`` bounds the steps that a preconditioner takes which has not yet followed growing gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State, statistics_dtype
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble
from lightning_plugins.engines.preconditioning.matrices import (
    add_moment_,
    axis_rows,
    multiply_axis,
    multiply_triangles,
    no_numbers,
    symmetric,
    working_shape,
)
from lightning_plugins.engines.preconditioning.settings import check_limit, check_positive


@dataclass(frozen=True)
class PSGDSettings:
    """Options of Kron-PSGD.

    Args:
        rate: mu, the largest relative change of a Q in an update; in (0, 1).
        noise: added to gradients before the fit, relative to their root mean square: bounds P where gradients have no entries.
        max_rms: bound on the root mean square of the entries of P; None does not bound it.
        max_dim: longer axes have a diagonal Q.
        flatten: take a kernel as a matrix of its first axis against the others; False gives every axis a Q.
        seed: of the random probes.

    Raises:
        InputError: where a value is out of range.
    """

    rate: float = 0.1
    noise: float = 1e-4
    max_rms: float | None = 1.1
    max_dim: int = 2048
    flatten: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.rate < 1.0:
            raise InputError(f"rate must be in (0, 1), got {self.rate}; 0.1 fits within some hundred updates")
        check_positive("noise", self.noise)
        if self.max_rms is not None:
            check_positive("max_rms", self.max_rms)
        check_limit("max_dim", self.max_dim)


class PSGD:
    """Kron-PSGD's state of one parameter; see :class:`~lightning_plugins.engines.preconditioning.blocks.GradientBlock`.

    Attributes:
        triangles: Q by axis: upper triangular ``(d, d)``, or a diagonal ``(d,)``; none before the first gradient.
        products: ``Q^T Q`` by axis, as of the last refresh.
    """

    def __init__(self, parameter: nn.Parameter, settings: PSGDSettings) -> None:
        self.settings = settings
        self.trouble = Trouble()
        self.shape = working_shape(parameter.shape, settings.flatten)
        self.dtype = statistics_dtype(parameter.dtype)
        self.refresh_cost = float(sum(length**3 for length in self.shape if length <= settings.max_dim))
        self.triangles: list[Tensor] = []
        self.products: list[Tensor] = []
        device = parameter.device
        self.generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(settings.seed)

    def fold(self, gradient: Tensor) -> None:
        """Fit the triangles to one more gradient; one of zeros says nothing and leaves them."""
        h = gradient.reshape(self.shape).to(self.dtype)
        size = h.square().mean().sqrt()
        if not self.triangles:
            if not bool(size > 0):
                return
            start = float(size) ** (-0.5 / len(self.shape))
            self.triangles = [self._start(length, start, h.device) for length in self.shape]
        v = torch.randn(self.shape, generator=self.generator, dtype=self.dtype, device=h.device)
        x = h + v * (size * self.settings.noise)
        y = v
        for axis, q in enumerate(self.triangles):
            x, y = _times(x, axis, q), _times_inverse_transpose(y, axis, q)
        rate = self.settings.rate * (size > 0).to(self.dtype)  # on the device: nothing waits for it
        for axis, q in enumerate(self.triangles):
            _update(q, x, y, axis, rate)

    def refresh(self) -> None:
        """Balance the sizes of the triangles, which P does not see and rounding does, and multiply them out."""
        sizes = [q.abs().max() for q in self.triangles]
        if not sizes:
            return
        common = torch.stack(sizes).log().mean().exp()
        for q, size in zip(self.triangles, sizes, strict=True):
            q.mul_(common / size)
        self.products = [_square(q) for q in self.triangles]

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the gradient whitened; itself as long as nothing was fitted."""
        if not self.products:
            return gradient.clone()
        tensor = gradient.reshape(self.shape).to(self.dtype)
        for axis, product in enumerate(self.products):
            tensor = _times(tensor, axis, product)
        if self.settings.max_rms is not None:
            tensor = tensor * (self.settings.max_rms / tensor.square().mean().sqrt()).clamp_max(1.0)
        return tensor.to(gradient.dtype).view(gradient.shape)

    def state_dict(self) -> State:
        return {
            "triangles": list(self.triangles),
            "products": list(self.products),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.triangles = [q.to(device, copy=True) for q in state["triangles"]]
        self.products = [product.to(device, copy=True) for product in state["products"]]
        self.generator.set_state(state["generator"].cpu())

    def _start(self, length: int, value: float, device: torch.device) -> Tensor:
        ones = torch.full((length,), value, dtype=self.dtype, device=device)
        return ones if length > self.settings.max_dim else ones.diag()


def _square(q: Tensor) -> Tensor:
    """Return ``Q^T Q``, of a diagonal as a diagonal."""
    if q.ndim == 1:
        return q.square()
    product = torch.zeros_like(q)
    add_moment_(product, q, 1, kept=0.0, taken=1.0)
    return symmetric(product)


def _times(tensor: Tensor, axis: int, q: Tensor) -> Tensor:
    if q.ndim == 2:
        return multiply_axis(tensor, axis, q)
    return tensor * q.view(-1, *[1] * (tensor.ndim - axis - 1))


def _times_inverse_transpose(tensor: Tensor, axis: int, q: Tensor) -> Tensor:
    if q.ndim == 1:
        return _times(tensor, axis, q.reciprocal())
    if axis == tensor.ndim - 1:
        rows = tensor.reshape(-1, len(q))
        return torch.linalg.solve_triangular(q, rows, upper=True, left=False).view(tensor.shape)
    columns = tensor.movedim(axis, 0)
    solved = torch.linalg.solve_triangular(q.mT, columns.flatten(1), upper=False)
    return solved.view(columns.shape).movedim(0, axis)


def _update(q: Tensor, x: Tensor, y: Tensor, axis: int, rate: Tensor) -> None:
    """Take one step of the Q of an axis in place."""
    if q.ndim == 1:
        ours, theirs = (axis_rows(tensor, axis).square().sum(1) for tensor in (x, y))
        q.sub_(rate * (ours - theirs) / (ours + theirs).max() * q)
        return
    difference = torch.zeros_like(q)
    add_moment_(difference, x, axis, kept=0.0, taken=1.0)
    add_moment_(difference, y, axis, kept=1.0, taken=-1.0)
    norm = _norm_from_below(axis_rows(x, axis), axis_rows(y, axis))
    q.sub_(multiply_triangles(difference.triu_(), q).mul_(rate / norm))


def _norm_from_below(x: Tensor, y: Tensor) -> Tensor:
    """Return a lower bound of the spectral norm of ``X X^T + Y Y^T``, without making it."""
    longest = (x.square().sum(1) + y.square().sum(1)).argmax()
    row = x @ x[longest] + y @ y[longest]
    row = row / row.norm()
    return (x @ (row @ x) + y @ (row @ y)).norm()


ENTRY = MethodEntry(
    curvature="second moment of the gradient",
    granularity="layer, Kronecker-factored",
    solver="fitted on a group of triangular matrices; none inverted",
    extra_passes="0",
    memory="2 (I^2 + O^2)",
    fishers=(),
    settings=PSGDSettings,
    make=PSGD,
    gradient_only=True,
    refuses=no_numbers,
)
