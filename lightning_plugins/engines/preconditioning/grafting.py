"""Grafting: the length of one optimizer's step for the direction of another.

    sgd  |V|      adagrad  |V / (sqrt(sum V^2) + e)|      rmsprop  |V / (sqrt(v^) + e)|      adam  |m^ / (sqrt(v^) + e)|

Paper: Agarwal et al., "Disentangling Adaptive Gradient Methods from Learning Rates", 2020. Averages have Adam's bias correction.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.engines.preconditioning.blocks import State
from lightning_plugins.engines.preconditioning.settings import check_decay, check_positive

Graft = Literal["none", "sgd", "adagrad", "rmsprop", "adam"]
GRAFTS = ("none", "sgd", "adagrad", "rmsprop", "adam")


class StepLength:
    """The norm of the step that an optimizer of learning rate 1 would take with a parameter.

    Args:
        graft: its name.
        betas: decays of the first moment (``adam``) and of the second (``adam``, ``rmsprop``).
        epsilon: added to the root of the second moment.

    Raises:
        InputError: where a value is out of range.
    """

    def __init__(self, graft: Graft, betas: tuple[float, float], epsilon: float) -> None:
        check_decay("graft_betas[0]", betas[0])
        check_decay("graft_betas[1]", betas[1])
        check_positive("graft_epsilon", epsilon)
        self.graft = graft
        self.betas = betas
        self.epsilon = epsilon
        self.steps = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def of(self, gradient: Tensor) -> Tensor | None:
        """Take in a gradient, which must be finite, and return the length of the step; None for ``none``."""
        if self.graft == "none":
            return None
        if self.graft == "sgd":
            return gradient.norm()
        self.steps += 1
        beta1, beta2 = self.betas
        if self.second is None:
            self.second = torch.zeros_like(gradient)
        if self.graft == "adagrad":
            self.second.addcmul_(gradient, gradient)
            root = self.second.sqrt()
        else:
            self.second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
            root = self.second.sqrt().div_((1.0 - beta2**self.steps) ** 0.5)
        if self.graft == "adam":
            if self.first is None:
                self.first = torch.zeros_like(gradient)
            self.first.lerp_(gradient, 1.0 - beta1)
            gradient = self.first / (1.0 - beta1**self.steps)
        return root.add_(self.epsilon).reciprocal_().mul_(gradient).norm()

    def state_dict(self) -> State:
        moments = {"first": self.first, "second": self.second}
        return {"steps": self.steps, **{name: moment for name, moment in moments.items() if moment is not None}}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.steps = int(state["steps"])
        self.first = state["first"].to(device, copy=True) if "first" in state else None
        self.second = state["second"].to(device, copy=True) if "second" in state else None
