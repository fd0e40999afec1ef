"""Shampoo: the gradient times an inverse root of its second moments, axis by axis.

    L_i <- L_i + V_(i) V_(i)^T      or      d L_i + (1 - d) V_(i) V_(i)^T
    P = V  x_1 (L_1 + e l_1 I)^(-1/2k)  ...  x_k (L_k + e l_k I)^(-1/2k)         l_i: the largest eigenvalue of L_i

Papers: Gupta et al., "Shampoo: Preconditioned Stochastic Tensor Optimization", 2018 (sums; k is the number of axes); Anil et al.,
2020 (grafting, coupled Newton); Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo
Optimizer", 2023 (averages). We count in k the axes that are preconditioned: an axis longer than ``max_dim`` keeps the identity
and the others take larger roots, so that the first step from zero is the polar factor of V whatever was left out. A parameter of
one axis is the paper's case k = 1, AdaGrad with a full matrix. The ridge is relative, and added to a copy of the statistics.

The roots say in which direction to go, and old ones say badly how far: grafting takes the length of another optimizer's step,
whose learning rate then fits. P is linear in V as long as the roots stand, so momentum belongs to the base optimizer:
``SGD(momentum=0.9)``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State, statistics_dtype
from lightning_plugins.engines.preconditioning.grafting import GRAFTS, Graft, StepLength
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble
from lightning_plugins.engines.preconditioning.matrices import add_moment_, multiply_axis, no_numbers, symmetric, working_shape
from lightning_plugins.engines.preconditioning.roots import ROOTS, Root, inverse_root
from lightning_plugins.engines.preconditioning.settings import check_choice, check_count, check_limit, check_positive


@dataclass(frozen=True)
class ShampooSettings:
    """Options of Shampoo.

    Args:
        decay: of the statistics' running averages; 1 sums them up, as the first paper does.
        epsilon: ridge, relative to the largest eigenvalue.
        order: every axis gets the power ``-1 / order``; None is ``2 k``. 2 on both sides of a matrix is close to the inverse root
            of the full second moment, and needs a graft.
        root: ``eigh``, or ``newton``, which has products of matrices alone.
        graft: whose step's length is taken: ``none``, ``sgd``, ``adagrad``, ``rmsprop`` or ``adam``.
        graft_betas: decays of the first moment (``adam``) and the second (``adam``, ``rmsprop``).
        graft_epsilon: added to the root of the graft's second moment.
        max_dim: longer axes are left alone.
        flatten: take a kernel as a matrix of its first axis against the others; False gives every axis a root.

    Raises:
        InputError: where a value is out of range.
    """

    decay: float = 0.95
    epsilon: float = 1e-6
    order: int | None = None
    root: Root = "eigh"
    graft: Graft = "adam"
    graft_betas: tuple[float, float] = (0.9, 0.999)
    graft_epsilon: float = 1e-8
    max_dim: int = 2048
    flatten: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise InputError(f"decay must be in [0, 1], got {self.decay}; 0.95 averages over about 20 updates, 1 sums up")
        check_positive("epsilon", self.epsilon)
        if self.order is not None:
            check_count("order", self.order)
        check_choice("root", self.root, ROOTS)
        check_choice("graft", self.graft, GRAFTS)
        check_limit("max_dim", self.max_dim)
        StepLength(self.graft, self.graft_betas, self.graft_epsilon)


class Shampoo:
    """Shampoo's state of one parameter; see :class:`~lightning_plugins.engines.preconditioning.blocks.GradientBlock`.

    Attributes:
        statistics: by axis, those that are preconditioned alone.
        roots: by axis; none before the first refresh.
        folds: gradients in the statistics.
    """

    def __init__(self, parameter: nn.Parameter, settings: ShampooSettings) -> None:
        self.settings = settings
        self.trouble = Trouble()
        self.shape = working_shape(parameter.shape, settings.flatten)
        self.dtype = statistics_dtype(parameter.dtype)
        axes = [axis for axis, length in enumerate(self.shape) if length <= settings.max_dim]
        self.refresh_cost = float(sum(self.shape[axis] ** 3 for axis in axes))
        self.order = settings.order or 2 * max(1, len(axes))
        self.statistics = {
            axis: torch.zeros(self.shape[axis], self.shape[axis], dtype=self.dtype, device=parameter.device) for axis in axes
        }
        self.roots: dict[int, Tensor] = {}
        self.folds = 0
        self.graft = StepLength(settings.graft, settings.graft_betas, settings.graft_epsilon)

    def fold(self, gradient: Tensor) -> None:
        """Add the gradient to the sums, or to the averages with their bias corrected: the first counts in full."""
        tensor = gradient.reshape(self.shape).to(self.dtype)
        self.folds += 1
        kept = min(1.0 - 1.0 / self.folds, self.settings.decay) if self.settings.decay < 1.0 else 1.0
        taken = 1.0 - kept if self.settings.decay < 1.0 else 1.0
        for axis, statistic in self.statistics.items():
            add_moment_(statistic, tensor, axis, kept=kept, taken=taken)

    def refresh(self) -> None:
        """Make the roots; all of them, or where one fails none: they belong to the same statistics."""
        new = {
            axis: inverse_root(symmetric(statistic), self.order, self.settings.epsilon, self.settings.root, self.trouble)
            for axis, statistic in self.statistics.items()
        }
        made = {axis: root for axis, root in new.items() if root is not None}
        if len(made) == len(new):
            self.roots = made

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the gradient times its roots, with the length of the graft's step."""
        tensor = gradient.reshape(self.shape).to(self.dtype)
        length = self.graft.of(tensor)
        direction = tensor
        for axis, root in self.roots.items():
            direction = multiply_axis(direction, axis, root)
        if length is not None:
            direction = direction * (length / direction.norm().clamp_min(torch.finfo(self.dtype).tiny))
        return direction.to(gradient.dtype).view(gradient.shape)

    def state_dict(self) -> State:
        return {
            "statistics": dict(self.statistics),
            "roots": dict(self.roots),
            "folds": self.folds,
            "graft": self.graft.state_dict(),
        }

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.statistics = {axis: statistic.to(device, copy=True) for axis, statistic in state["statistics"].items()}
        self.roots = {axis: root.to(device, copy=True) for axis, root in state["roots"].items()}
        self.folds = int(state["folds"])
        self.graft.load_state_dict(state["graft"], device)


ENTRY = MethodEntry(
    curvature="second moment of the gradient",
    granularity="layer, Kronecker-factored",
    solver="inverse roots by eigendecomposition or coupled Newton",
    extra_passes="0",
    memory="2 (I^2 + O^2); grafting up to 2 O I",
    fishers=(),
    settings=ShampooSettings,
    make=Shampoo,
    gradient_only=True,
    refuses=no_numbers,
)
