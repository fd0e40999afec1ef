"""Muon: the momentum of a weight matrix with all its singular values made about 1.

    M <- mu M + (1 - mu) V        U = (1 - mu) V + mu M  (Nesterov)  or  M
    X = U / |U|_F,   five times   X <- a X + (b S + c S^2) X,  S = X X^T
    P = sqrt(max(1, O / I)) X

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, with its coefficients: they are chosen for
their slope at 0, so the singular values end between about 0.7 and 1.2 and not at 1. We run it in bfloat16 on CUDA as the source
does, but in the statistics' own precision on a CPU: not every CPU multiplies bfloat16 faster than float32.

The momentum is inside: the base optimizer is ``SGD(momentum=0)``. Parameters of one axis, and whatever is ignored by name (the
source leaves out embeddings and the last layer), keep the plain gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State, statistics_dtype
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble
from lightning_plugins.engines.preconditioning.matrices import no_numbers, working_shape
from lightning_plugins.engines.preconditioning.settings import check_count, check_decay

_A, _B, _C = 3.4445, -4.7750, 2.0315


@dataclass(frozen=True)
class MuonSettings:
    """Options of Muon.

    Args:
        momentum: of the running average of gradients.
        nesterov: look ahead by one step.
        iterations: of Newton and Schulz.

    Raises:
        InputError: where a value is out of range.
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5

    def __post_init__(self) -> None:
        check_decay("momentum", self.momentum)
        check_count("iterations", self.iterations)


class Muon:
    """Muon's state of one parameter; see :class:`~lightning_plugins.engines.preconditioning.blocks.GradientBlock`.

    It has nothing to fold or refresh: the momentum moves with every direction.
    """

    refresh_cost = 0.0

    def __init__(self, parameter: nn.Parameter, settings: MuonSettings) -> None:
        self.settings = settings
        self.trouble = Trouble()
        self.shape = working_shape(parameter.shape, flatten=True)
        self.dtype = statistics_dtype(parameter.dtype)
        self.momentum = torch.zeros(self.shape, dtype=self.dtype, device=parameter.device)

    def fold(self, gradient: Tensor) -> None:
        """Nothing is averaged apart from the momentum."""

    def refresh(self) -> None:
        """Nothing outlives a step."""

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the orthogonalised momentum."""
        matrix = gradient.reshape(self.shape).to(self.dtype)
        decay = self.settings.momentum
        self.momentum.lerp_(matrix, 1.0 - decay)
        update = matrix.lerp(self.momentum, decay) if self.settings.nesterov else self.momentum
        if update.is_cuda and update.dtype == torch.float32:
            update = update.bfloat16()
        out_dim, in_dim = self.shape
        direction = orthogonalize(update, self.settings.iterations).mul_(max(1.0, out_dim / in_dim) ** 0.5)
        return direction.to(gradient.dtype).view(gradient.shape)

    def state_dict(self) -> State:
        return {"momentum": self.momentum}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.momentum = state["momentum"].to(device, copy=True)


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """Return ``U V^T`` for ``matrix = U S V^T``, up to singular values between about 0.7 and 1.2.

    Args:
        matrix: ``(O, I)`` of any scale; zeros give zeros.
        iterations: five reach singular values of 1e-3 of the norm and more.
    """
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp_min(torch.finfo(wide.dtype).tiny)
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x.mT.contiguous() if matrix.shape[0] > matrix.shape[1] else x


def _refuses(parameter: nn.Parameter) -> str:
    if parameter.ndim < 2:
        return "one axis: Muon needs a matrix"
    return no_numbers(parameter)


ENTRY = MethodEntry(
    curvature="none: the spectral norm is the measure of a step",
    granularity="layer",
    solver="Newton-Schulz",
    extra_passes="0",
    memory="O I",
    fishers=(),
    settings=MuonSettings,
    make=Muon,
    gradient_only=True,
    refuses=_refuses,
)
