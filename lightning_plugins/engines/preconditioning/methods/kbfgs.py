"""K-BFGS: a Hessian of Kronecker products, one per layer, whose inverses follow from changes alone.

    P = H_G V H_A        H_A ~ (A + lambda_A I)^-1        H_G ~ (d^2 L / dh^2 + lambda_G I)^-1

Both inverses take one BFGS update a step, ``H <- (I - s y^T / r) H (I - y s^T / r) + s s^T / r`` with ``r = s^T y``, from

    inputs     s = H_A a~,  y = (A + lambda_A I) s                 a~ = mean input of the batch,  A = second moment of inputs
    outputs    s = mean of h+ - h,  y = mean of d+ - d + lambda_G s       h = W a~,  d = gradient at the layer's output

where ``+`` marks the same batch after the step; ``s`` and ``y`` are running averages, and Powell's damping keeps ``s^T y`` from
falling below ``0.2 y^T H_G y``. Papers: Goldfarb, Ren and Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural
Networks", NeurIPS 2020; Ren, Bahamou and Goldfarb, "Kronecker-factored Quasi-Newton Methods for Deep Learning", 2021
(convolutions). ``A`` averages over positions and ``d`` adds them up, so that a layer with ``R`` positions has ``lambda_A =
sqrt(lambda / R)`` and ``lambda_G = sqrt(lambda R)``, which are the paper's values in our units. ``H_A`` starts as the inverse
itself, ``H_G`` as the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State
from lightning_plugins.engines.preconditioning.factors import RunningMean
from lightning_plugins.engines.preconditioning.kronecker import KroneckerFactors, split
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble, damped_inverse
from lightning_plugins.engines.preconditioning.settings import check_count, check_decay

# Least share of y^T H y that s^T y is given by Powell's damping (the paper's mu_1).
POWELL = 0.2


@dataclass(frozen=True)
class KBFGSSettings:
    """Options of K-BFGS.

    Args:
        decay: of the running averages of the input factor and of the pairs.
        max_dim: inverses wider than this become block-diagonal.

    Raises:
        InputError: where a value is out of range.
    """

    decay: float = 0.9
    max_dim: int = 1024

    def __post_init__(self) -> None:
        check_decay("decay", self.decay)
        check_count("max_dim", self.max_dim)


def bfgs_update(inverse: Tensor, s: Tensor, y: Tensor, trouble: Trouble) -> Tensor:
    """Return the inverse that is nearest to ``inverse`` and maps ``y`` to ``s``.

    Args:
        inverse: symmetric positive definite ``(..., d, d)``.
        s: change of the argument, ``(..., d)``.
        y: change of the gradient, ``(..., d)``; where ``s^T y`` is not positive the inverse is kept.
        trouble: counts the inverses that were kept.
    """
    image = (inverse @ y.unsqueeze(-1)).squeeze(-1)
    curvature = (s * y).sum(-1)
    usable = curvature > torch.finfo(s.dtype).tiny
    curvature = curvature.where(usable, 1.0)[..., None, None]
    cross = image.unsqueeze(-1) * s.unsqueeze(-2)
    own = s.unsqueeze(-1) * s.unsqueeze(-2) * (1.0 + (y * image).sum(-1)[..., None, None] / curvature)
    new = inverse + (own - (cross + cross.mT)) / curvature
    usable &= new.isfinite().all(-1).all(-1)
    trouble.kept_inverses += int((~usable).sum())
    return new.where(usable[..., None, None], inverse)


def powell_damped(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Return ``s`` moved towards ``H y`` until ``s^T y >= 0.2 y^T H y``; shapes as in :func:`bfgs_update`."""
    image = (inverse @ y.unsqueeze(-1)).squeeze(-1)
    least = (y * image).sum(-1, keepdim=True)
    curvature = (s * y).sum(-1, keepdim=True)
    weak = curvature < POWELL * least
    theta = ((1.0 - POWELL) * least / (least - curvature).where(weak, 1.0)).where(weak, 1.0)
    return theta * s + (1.0 - theta) * image


class KBFGS:
    """K-BFGS's state of one layer; see :class:`~lightning_plugins.engines.preconditioning.blocks.ReplayedBlock`."""

    def __init__(self, layer: Layer, settings: KBFGSSettings, fisher: str) -> None:
        self.layers = (layer,)
        self.trouble = Trouble()
        self.factors = KroneckerFactors(layer, "expand", settings.decay, settings.max_dim, with_outputs=False)
        self.dtype = self.factors.dtype
        self.steps = RunningMean(settings.decay)
        self.changes = RunningMean(settings.decay)
        blocks, _, in_dim = layer.shape
        self.refresh_cost = float(blocks * in_dim**2)
        self.input_inverse: Tensor | None = None
        self.output_inverse: Tensor | None = None
        self._sums: list[Tensor] | None = None  # of this step: a (B, I), d (B, O)
        self._replayed: list[Tensor] | None = None  # of its replay: the same, and rows
        self._mean_inputs: Tensor | None = None
        self._before: tuple[Tensor, Tensor] | None = None
        self._positions = 1.0

    @property
    def rows(self) -> int:
        return self.factors.rows

    def accumulate_inputs(self, layer: Layer, x: Tensor) -> None:
        self.factors.accumulate_inputs(x)
        self._step_sums()[0].add_(self._input_sum(x)[0])

    def accumulate_output_gradients(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        self._step_sums()[1].add_(self._gradient_sum(gradient), alpha=1.0 / scale)

    def finish_pass(self) -> None:
        """Nothing waits for the end of a pass: every row counts by itself."""

    def pending(self) -> list[Tensor]:
        return [*self.factors.pending(), *self._step_sums()]

    def fold(self, rows: int, terms: float) -> None:
        """Take in the input factor, and keep what the replay is compared with."""
        inputs, gradients = self._step_sums()
        self._mean_inputs = inputs / rows
        self._before = self._outputs(self._mean_inputs), gradients / terms
        self._positions = rows / terms
        self.factors.fold(rows, terms)
        self.clear()

    def clear(self) -> None:
        self.factors.clear()
        self._sums = None

    def refresh(self, damping: float) -> None:
        """Update the inverse of the input factor by one pair; the first time invert it."""
        factor = self.factors.inputs.value
        assert factor is not None
        assert self._mean_inputs is not None
        ridge = (damping / self._positions) ** 0.5
        if self.input_inverse is None:
            inverse = damped_inverse(factor, factor.new_full(factor.shape[:-2] + (1,), ridge), self.trouble)
            self.input_inverse = _identities(factor) if inverse is None else inverse
            return
        mean = self._mean_inputs[:, None, None]
        direction = self.input_inverse @ split(mean, self.factors.input_pieces).mT
        image = factor @ direction + ridge * direction
        self.input_inverse = bfgs_update(self.input_inverse, direction.squeeze(-1), image.squeeze(-1), self.trouble)

    def derived(self) -> list[Tensor]:
        if self.input_inverse is None:
            assert self.factors.inputs.value is not None
            self.input_inverse = torch.empty_like(self.factors.inputs.value)
        return [self.input_inverse]

    def accumulate_replayed(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        inputs, rows = self._input_sum(x)
        sums = self._replay_sums()
        sums[0].add_(inputs)
        sums[1].add_(self._gradient_sum(gradient), alpha=1.0 / scale)
        sums[2].add_(rows)

    def replayed(self) -> list[Tensor]:
        return self._replay_sums()

    def fold_replayed(self, terms: float, damping: float) -> None:
        """Update the output inverse by the change of outputs and their gradients over the step; without terms by nothing."""
        inputs, gradients, rows = self._replay_sums()
        before, self._before, self._replayed = self._before, None, None
        if before is None or not terms:
            return
        self.steps.add(self._outputs(inputs / rows.clamp_min(1.0).to(self.dtype)) - before[0])
        self.changes.add(gradients / terms - before[1])
        s, y = (self._output_pieces(mean.value) for mean in (self.steps, self.changes))
        if self.output_inverse is None:
            self.output_inverse = _identities(s.unsqueeze(-1) * s.unsqueeze(-2))
        s = powell_damped(self.output_inverse, s, y)
        ridge = (damping * self._positions) ** 0.5
        self.output_inverse = bfgs_update(self.output_inverse, s, y + ridge * s, self.trouble)

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ``H_G V H_A``, with identities as long as there is nothing else."""
        (gradient,) = gradients
        blocked = self.factors.blocked(gradient)
        if self.input_inverse is not None:
            blocked = blocked @ self.input_inverse.unsqueeze(1)
        if self.output_inverse is not None:
            blocked = self.output_inverse.unsqueeze(2) @ blocked
        return [self.factors.unblocked(blocked).to(gradient.dtype)]

    def state_dict(self) -> State:
        kept = {name: getattr(self, name) for name in ("input_inverse", "output_inverse", "_mean_inputs")}
        return {
            "factors": self.factors.state_dict(),
            "steps": self.steps.state_dict(),
            "changes": self.changes.state_dict(),
            "positions": self._positions,
            "tensors": {name: tensor for name, tensor in kept.items() if tensor is not None},
        }

    def load_state_dict(self, state: State, device: torch.device) -> None:
        """Take in a state; a step that was not replayed when it was saved stays without its pair."""
        self.factors.load_state_dict(state["factors"], device)
        self.steps.load_state_dict(state["steps"], device)
        self.changes.load_state_dict(state["changes"], device)
        self._positions = state["positions"]
        for name in ("input_inverse", "output_inverse", "_mean_inputs"):
            tensor = state["tensors"].get(name)
            setattr(self, name, None if tensor is None else tensor.to(device, copy=True))
        self._before = None

    def _input_sum(self, x: Tensor) -> tuple[Tensor, int]:
        """Return the sum of input rows, ``(B, I)``, and how many they were."""
        parts = [self.layers[0].inputs(part).to(self.dtype) for part in self.factors.parts(x)]
        return torch.stack([rows.sum(dim=(1, 2)) for rows in parts]).sum(0), sum(rows.shape[1] * rows.shape[2] for rows in parts)

    def _gradient_sum(self, gradient: Tensor) -> Tensor:
        return self.layers[0].output_gradients(gradient).to(self.dtype).sum(dim=(1, 2))

    def _outputs(self, inputs: Tensor) -> Tensor:
        """Return ``W a`` for one input per block, ``(B, I)``, with the present weights."""
        layer = self.layers[0]
        weight = layer.joined(*(parameter.detach() for parameter in layer.parameters)).to(self.dtype)
        return (weight @ inputs.unsqueeze(-1)).squeeze(-1)

    def _output_pieces(self, vector: Tensor | None) -> Tensor:
        assert vector is not None
        return split(vector[:, None, None], self.factors.output_pieces).squeeze(-2)

    def _step_sums(self) -> list[Tensor]:
        if self._sums is None:
            self._sums = self._zeros()
        return self._sums

    def _replay_sums(self) -> list[Tensor]:
        if self._replayed is None:
            inputs, gradients = self._zeros()
            self._replayed = [inputs, gradients, inputs.new_zeros(1, dtype=torch.float64)]
        return self._replayed

    def _zeros(self) -> list[Tensor]:
        blocks, out_dim, in_dim = self.layers[0].shape
        device = self.layers[0].weight.device
        return [torch.zeros(blocks, size, dtype=self.dtype, device=device) for size in (in_dim, out_dim)]


def _identities(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like).contiguous()


ENTRY = MethodEntry(
    curvature="Hessian",
    granularity="layer, Kronecker-factored",
    solver="BFGS updates of both inverses",
    extra_passes="1 forward and backward, after the step",
    memory="2 I^2 + O^2",
    fishers=("empirical",),
    settings=KBFGSSettings,
    make=KBFGS,
    kinds=("linear", "convolution"),
    replays=True,
    damping=0.3,
)
