"""What is tried of every optimizer that is compared: as many settings of each, around the best that is known.

A trial is a learning rate, and a damping where the method has one. The middles of the grids were found with
``benchmarks/preconditioning_convergence.py``, which tries them anew and says where a best one lies at an edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.preconditioning import METHODS

FIRST_ORDER = ("adamw", "sgd")
CONTESTANTS = (*FIRST_ORDER, *METHODS)

# Methods whose direction has a momentum already; the base optimizer of all others has one of 0.9.
OWN_MOMENTUM = ("soap", "muon")
# What is not tried: intervals between two refreshes, so that steps cost about the same, and what keeps a method from diverging
# or, of Shampoo, which roots its graft allows. Whatever is not named has its defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "kfac": {"inverse_every": 5},
    "ekfac": {"inverse_every": 5, "kl_clip": 3e-4},
    "foof": {"inverse_every": 5},
    "unit": {"factor_every": 5, "inverse_every": 10},
    "soap": {"inverse_every": 5},
    "shampoo": {"inverse_every": 5, "order": 2},
}
# Factors between two neighbours of a grid: of learning rates alone, and of learning rates and dampings together.
RATE_ALONE, RATE_BESIDE, DAMPING = 10 ** (1 / 6), 10 ** (1 / 3), 10 ** (1 / 2)

# Learning rate and damping in the middle of the grid, by task.
_MIDDLES: dict[str, dict[str, tuple[float, float | None]]] = {
    "deep_autoencoder": {
        "adamw": (0.0045, None),
        "sgd": (0.02, None),
        "kfac": (0.01, 0.03),
        "foof": (0.01, 0.1),
        "ekfac": (0.01, 0.03),
        "unit": (0.003, 0.03),
        "diag": (0.0003, 0.001),
        "layer": (0.03, 0.03),
        "full": (0.01, 0.03),
        "kbfgs": (0.05, 1.0),
        "seng": (0.03, 0.03),
        "psgd": (0.0025, None),
        "shampoo": (0.0014, None),
        "soap": (0.007, None),
        "muon": (0.002, None),
    },
    "character_transformer": {
        "adamw": (0.012, None),
        "sgd": (0.3, None),
        "kfac": (0.03, 0.01),
        "foof": (0.3, 0.1),
        "ekfac": (0.01, 0.003),
        "unit": (0.01, 0.003),
        "diag": (0.003, 0.003),
        "layer": (0.1, 0.01),
        "full": (0.1, 0.01),
        "kbfgs": (0.2, 0.3),
        "seng": (0.1, 0.01),
        "psgd": (0.001, None),
        "shampoo": (0.002, None),
        "soap": (0.009, None),
        "muon": (0.01, None),
    },
}


@dataclass(frozen=True)
class Trial:
    """One setting of one contestant.

    Attributes:
        method: name in ``CONTESTANTS``.
        learning_rate: of the base optimizer.
        damping: None where the method has none.
    """

    method: str
    learning_rate: float
    damping: float | None = None

    @property
    def momentum(self) -> float:
        """Return the base optimizer's momentum; of AdamW its first beta."""
        return 0.0 if self.method in OWN_MOMENTUM else 0.9

    def make_optimizer(self, module: nn.Module) -> Optimizer:
        """Return the base optimizer; there is no weight decay."""
        if self.method == "adamw":
            return AdamW(module.parameters(), lr=self.learning_rate, weight_decay=0.0)
        return SGD(module.parameters(), lr=self.learning_rate, momentum=self.momentum, nesterov=self.method == "sgd")

    def options(self) -> dict[str, Any]:
        """Return the options of the preconditioner; for those that have one."""
        options = OPTIONS.get(self.method, {})
        return options if self.damping is None else {"damping": self.damping, **options}

    def row(self) -> dict[str, Any]:
        """Return the setting as cells of a table."""
        return {
            "method": self.method,
            "learning_rate": self.learning_rate,
            "damping": self.damping,
            "momentum": self.momentum,
            "options": " ".join(f"{name}={value}" for name, value in OPTIONS.get(self.method, {}).items()),
        }


def trials(task: str, method: str, count: int) -> list[Trial]:
    """Return ``count`` trials of a contestant, the middle of its grid first, then in rings around it.

    Learning rates alone where there is no damping, else learning rates beside three dampings.

    Raises:
        InputError: for an unknown contestant, or less than one trial.
    """
    if method not in CONTESTANTS:
        raise InputError(f"there is no contestant {method!r}; {nearest(method, CONTESTANTS)}")
    if count < 1:
        raise InputError(f"trials must be 1 or more, got {count}; 1 takes the middle of every grid")
    rate, damping = _middle(task, method)
    if damping is None:
        return [Trial(method, _rounded(rate * RATE_ALONE**i)) for i in _around(count)]
    lattice = sorted(product(_around(-(-count // 3)), _around(3)), key=lambda ij: abs(ij[0]) + abs(ij[1]))
    return [Trial(method, _rounded(rate * RATE_BESIDE**i), _rounded(damping * DAMPING**j)) for i, j in lattice[:count]]


def at_edge(best: Trial, tried: Sequence[Trial]) -> bool:
    """Tell whether a grid ends at its best trial, so that a better one may lie outside."""
    rates = [trial.learning_rate for trial in tried]
    dampings = [trial.damping for trial in tried if trial.damping is not None]
    return best.learning_rate in (min(rates), max(rates)) or best.damping in (min(dampings, default=0), max(dampings, default=0))


def _middle(task: str, method: str) -> tuple[float, float | None]:
    if (known := _MIDDLES[task].get(method)) is not None:
        return known
    entry = METHODS[method]
    return (0.003, None) if entry.gradient_only else (0.3 * entry.damping, entry.damping)


def _around(count: int) -> list[int]:
    """Return 0, 1, -1, 2, -2, ..."""
    return [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(count)]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
