"""SOAP: Adam in the eigenbases of Shampoo's statistics.

    L <- d L + (1 - d) V V^T      R <- d R + (1 - d) V^T V      Q_L, Q_R: their eigenvectors
    V' = Q_L^T V Q_R,   Adam's moments m, v of V',   P = Q_L [m^ / (sqrt(v^) + eps)] Q_R^T

Paper: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024. Bases come from an eigendecomposition first and
from one step of orthogonal iteration at every later refresh; the second moment follows the sorting of the columns. We differ in
three things. The first moment is kept in the basis and turned when the basis turns, which is the same and saves two products of
matrices in every step. And statistics see a gradient before it is used, not after: the first step is taken in the bases of its
own gradient, where Adam makes every singular value 1 (the polar factor of V), instead of being left out. Entries of a step in the
basis are limited to ten times what Adam could make there had the basis never turned.

P is a whole step and not a gradient: it has Adam's size and momentum. The base optimizer is ``SGD(momentum=0)`` with a learning
rate such as Adam's; another optimizer's momentum or normalisation would act twice. Its weight decay comes after us (decoupled).

Parameters of one axis get Adam as it is, and so does every axis that is longer than ``max_dim``: its basis is the identity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State, statistics_dtype
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble
from lightning_plugins.engines.preconditioning.matrices import add_moment_, multiply_axis, no_numbers, symmetric, working_shape
from lightning_plugins.engines.preconditioning.roots import eigenbasis, turned_basis
from lightning_plugins.engines.preconditioning.settings import check_decay, check_limit, check_positive

# Rounding of the rotations, relative to the largest entry: what is smaller is no gradient, and Adam would blow it up to 1.
_ROUNDING = 32.0
# How far an entry of a step may exceed Adam's bound because its basis turned: ordinary turns stay within a few times.
_TURNING = 10.0


@dataclass(frozen=True)
class SOAPSettings:
    """Options of SOAP.

    Args:
        betas: decays of the first and second moment.
        epsilon: added to the root of the second moment.
        decay: of the statistics whose eigenvectors are the bases.
        max_dim: longer axes keep the identity as their basis; 0 is Adam.
        flatten: take a kernel as a matrix of its first axis against the others; False gives every axis a basis.

    Raises:
        InputError: where a value is out of range.
    """

    betas: tuple[float, float] = (0.95, 0.95)
    epsilon: float = 1e-8
    decay: float = 0.95
    max_dim: int = 2048
    flatten: bool = True

    def __post_init__(self) -> None:
        check_decay("betas[0]", self.betas[0])
        check_decay("betas[1]", self.betas[1])
        check_positive("epsilon", self.epsilon)
        check_decay("decay", self.decay)
        check_limit("max_dim", self.max_dim)


class SOAP:
    """SOAP's state of one parameter; see :class:`~lightning_plugins.engines.preconditioning.blocks.GradientBlock`.

    Attributes:
        statistics: by axis, those with a basis alone.
        bases: by axis; none before the first refresh.
        first: moment, in the bases.
        second: moment, in the bases.
        steps: that the moments have seen.
    """

    def __init__(self, parameter: nn.Parameter, settings: SOAPSettings) -> None:
        self.settings = settings
        self.trouble = Trouble()
        self.shape = working_shape(parameter.shape, settings.flatten)
        self.dtype = statistics_dtype(parameter.dtype)
        axes = [axis for axis, length in enumerate(self.shape) if len(self.shape) > 1 and length <= settings.max_dim]
        self.refresh_cost = float(sum(self.shape[axis] ** 3 for axis in axes))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=parameter.device)

        self.statistics = {axis: zeros(self.shape[axis], self.shape[axis]) for axis in axes}
        self.bases: dict[int, Tensor] = {}
        self.first, self.second = zeros(*self.shape), zeros(*self.shape)
        self.steps = 0

    def fold(self, gradient: Tensor) -> None:
        """Take the gradient into the statistics; their missing bias correction does not change eigenvectors."""
        tensor = gradient.reshape(self.shape).to(self.dtype)
        for axis, statistic in self.statistics.items():
            add_moment_(statistic, tensor, axis, kept=self.settings.decay, taken=1.0 - self.settings.decay)

    def refresh(self) -> None:
        """Make the bases or turn them, and the moments with them; an eigendecomposition that fails keeps what there was."""
        for axis, statistic in self.statistics.items():
            old = self.bases.get(axis)
            if old is None:
                new = eigenbasis(symmetric(statistic), self.trouble)
                if new is None:
                    continue
                # Moments that were gathered without a basis are rare (it failed before), and their squares cannot be turned.
                self.first = multiply_axis(self.first, axis, new.mT)
            else:
                new, order = turned_basis(symmetric(statistic), old)
                self.first = multiply_axis(multiply_axis(self.first, axis, old), axis, new.mT)
                self.second = self.second.index_select(axis, order)
            self.bases[axis] = new

    def direction(self, gradient: Tensor) -> Tensor:
        """Take the gradient into Adam's moments, and return Adam's step."""
        tensor = gradient.reshape(self.shape).to(self.dtype)
        for axis, basis in self.bases.items():
            tensor = multiply_axis(tensor, axis, basis.mT)
        self.steps += 1
        beta1, beta2 = self.settings.betas
        self.first.lerp_(tensor, 1.0 - beta1)
        self.second.mul_(beta2).addcmul_(tensor, tensor, value=1.0 - beta2)
        root = self.second.sqrt()
        floor = root.max() * (_ROUNDING * torch.finfo(self.dtype).eps) if self.bases else 0.0
        # Adam's corrections of both moments and its epsilon, all in the denominator: a pass over memory less.
        first_correction, second_correction = 1.0 - beta1**self.steps, (1.0 - beta2**self.steps) ** 0.5
        root.add_(floor + self.settings.epsilon * second_correction).mul_(first_correction / second_correction)
        step = self.first / root
        if self.bases:
            largest = self._largest_entry()
            step.clamp_(-largest, largest)
        for axis, basis in self.bases.items():
            step = multiply_axis(step, axis, basis)
        return step.to(gradient.dtype).view(gradient.shape)

    def _largest_entry(self) -> float:
        """Return ten times what Adam's step cannot exceed while its basis stands still, by Cauchy and Schwarz.

        When a basis turns, the first moment turns with it and the second does not: along a direction that had hardly a gradient
        before, their quotient would be thousands. That happens in early steps of batches with fewer rows than inputs.
        """
        beta1, beta2 = self.settings.betas
        ratio = beta1**2 / beta2 if beta2 else 0.0
        powers = float(self.steps) if ratio == 1.0 else (1.0 - ratio**self.steps) / (1.0 - ratio)
        corrections = (1.0 - beta2**self.steps) ** 0.5 / (1.0 - beta1**self.steps)
        return _TURNING * corrections * (1.0 - beta1) * (powers / (1.0 - beta2)) ** 0.5

    def state_dict(self) -> State:
        return {
            "statistics": dict(self.statistics),
            "bases": dict(self.bases),
            "first": self.first,
            "second": self.second,
            "steps": self.steps,
        }

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.statistics = {axis: statistic.to(device, copy=True) for axis, statistic in state["statistics"].items()}
        self.bases = {axis: basis.to(device, copy=True) for axis, basis in state["bases"].items()}
        self.first, self.second = state["first"].to(device, copy=True), state["second"].to(device, copy=True)
        self.steps = int(state["steps"])


ENTRY = MethodEntry(
    curvature="second moment of the gradient",
    granularity="layer, Kronecker-factored bases, element-wise scales",
    solver="eigenvectors, then warm QR; Adam in their basis",
    extra_passes="0",
    memory="2 (I^2 + O^2) + 2 O I",
    fishers=(),
    settings=SOAPSettings,
    make=SOAP,
    gradient_only=True,
    refuses=no_numbers,
)
