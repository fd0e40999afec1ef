"""The rivals of ``preconditioning.py``, each driven as its own documentation says, and what is wrong with them.

A rival is imported only if the installed distribution is the pinned one and names the right author: others have taken some of
these libraries' names. Where a library offers settings that change its speed alone, it gets the fastest of them. What is said to
be wrong is computed in the run by a ``check``, and not said when the check finds nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import Any

import torch
from _step_time import LEARNING_RATE, OptimizerStepper, Stepper
from torch import Tensor, nn
from torch.nn import functional

DAMPING = 0.03

# Ours and HeavyBall's default; others get it where they have such an option.
LONGEST_AXIS = 2048

# What no package index carries under the name that its own repository gives it.
NOT_CARRIED = {
    "ASDL (asdfghjkl)": "the index has no distribution of that name, and its asdl is another author's package",
    "kfac-pytorch": "the index has no distribution of that name",
    "Distributed Shampoo (torch-shampoo)": "the index has no distribution of that name",
    "SOAP reference": "one file in a repository; never a distribution",
}

# Distribution: version and part of the author's line.
PINNED = {
    "pytorch_optimizer": ("4.1.0", "kozistr"),
    "heavyball": ("3.2.1", "nestler.sh"),
    "curvlinops-for-pytorch": ("3.0.1", "Felix Dangel"),
}


class CurvlinopsStepper:
    """K-FAC as a linear operator, made anew at every step: it passes over the batch itself to make its factors."""

    kind: object = None

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.forward: Callable[[Tensor], Tensor] = net
        self.parameters = list(net.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=LEARNING_RATE)
        self.holds: list[Any] = []

    def step(self, inputs: Tensor, targets: Tensor, watch: Callable[[], None]) -> Tensor:
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.forward(inputs), targets)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
        inverse = self.inverse(inputs, targets)
        for parameter, direction in zip(self.parameters, inverse @ gradients, strict=True):
            parameter.grad = direction
        self.holds = [inverse]
        watch()
        self.optimizer.step()
        return loss.detach()

    def inverse(self, inputs: Tensor, targets: Tensor) -> Any:
        """Return the inverse with the same damping as ours; what would only cost time is switched off."""
        library = import_module("curvlinops")
        factors = library.KFACLinearOperator(
            self.net,
            nn.CrossEntropyLoss(),
            self.parameters,
            [(inputs, targets)],
            check_deterministic=False,
            fisher_type=library.FisherType.EMPIRICAL,
            separate_weight_and_bias=False,
            num_data=len(inputs),
            num_per_example_loss_terms=1,
        )
        return library.KFACInverseLinearOperator(factors, damping=DAMPING, use_heuristic_damping=True)


@dataclass(frozen=True)
class Peer:
    """A rival.

    Attributes:
        choices: settings that differ in speed alone, of which the fastest runs.
        period: steps after which its work repeats.
        check: says what is wrong with it, or nothing.
        longest_axis: it has no cap on the axes that it decomposes, and with longer ones a step takes minutes.
    """

    variant: str
    distribution: str
    choices: dict[str, Callable[[nn.Module], Stepper]]
    period: int = 1
    check: Callable[[], str] = field(default=lambda: "")
    longest_axis: int | None = None


def missing(distribution: str) -> str:
    """Return why a distribution cannot run here, or nothing; torch is the project's own."""
    if distribution not in PINNED:
        return ""
    version, author = PINNED[distribution]
    try:
        found = metadata.metadata(distribution).json
    except metadata.PackageNotFoundError:
        return "not installed; see requirements-preconditioning.txt"
    names = f"{found.get('author', '')} {found.get('author_email', '')}"
    if found["version"] != version or author not in names:
        return f"installed is {found['version']} of{names}, pinned is {version} of {author}"
    return ""


def peers() -> Iterator[Peer]:
    """Yield every rival, installed or not."""
    yield Peer("torch.optim.Muon", "torch", {"defaults; SGD for biases and kernels": _torch_muon})
    own = "pytorch_optimizer"
    for period in (1, 10):
        settings = {f"preconditioning_compute_steps={period}": _theirs(own, "Shampoo", period, "preconditioning_compute_steps")}
        yield Peer(f"{own} Shampoo T={period}", own, settings, period, _stands_still if period > 1 else lambda: "", LONGEST_AXIS)
    scalable = {
        f"preconditioning_compute_steps=10, use_svd={svd}": _theirs(
            own, "ScalableShampoo", 10, "preconditioning_compute_steps", use_svd=svd
        )
        for svd in (False, True)
    }
    yield Peer(f"{own} ScalableShampoo T=10", own, scalable, 10)
    soap = {
        f"precondition_frequency=10, max_precondition_dim={LONGEST_AXIS}, merge_dims={merge}": _theirs(
            own, "SOAP", 10, "precondition_frequency", max_precondition_dim=LONGEST_AXIS, merge_dims=merge
        )
        for merge in (False, True)
    }
    yield Peer(f"{own} SOAP f=10", own, soap, 10, _leaves_out_the_first_step)
    kron = {f"max_size_triangular={LONGEST_AXIS}": _theirs(own, "Kron", max_size_triangular=LONGEST_AXIS)}
    yield Peer(f"{own} Kron-PSGD", own, kron)
    for name, variant, period, options in (
        ("SOAP", "SOAP f=10", 10, {"precondition_frequency": 10}),
        ("PSGDKron", "Kron-PSGD", 1, {}),
        ("Muon", "Muon", 1, {}),
    ):
        modes = {f"compile_mode={mode}": _heavyball(name, mode, options) for mode in HEAVYBALL_MODES}
        yield Peer(f"heavyball {variant}", "heavyball", modes, period)
    yield Peer("curvlinops K-FAC", "curvlinops-for-pytorch", {"empirical, heuristic damping": CurvlinopsStepper})


# Its own mode compiles every optimizer for minutes on one core, which would be most of this run; on a CPU compiled SOAP and Muon
# took about as many times SGD's step as these.
HEAVYBALL_MODES = (None,)


def _torch_muon(net: nn.Module) -> Stepper:
    matrices = [parameter for parameter in net.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in net.parameters() if parameter.ndim != 2]
    return OptimizerStepper(net, torch.optim.Muon(matrices, lr=LEARNING_RATE), torch.optim.SGD(others, lr=LEARNING_RATE))


def _theirs(module: str, name: str, period: int = 1, interval: str = "", **options: Any) -> Callable[[nn.Module], Stepper]:
    """Return a builder of an optimizer of ``pytorch_optimizer``, all else as its defaults are."""

    def build(net: nn.Module) -> Stepper:
        optimizer = getattr(import_module(module), name)
        given = options | ({interval: period} if interval else {})
        return OptimizerStepper(net, optimizer(net.parameters(), lr=LEARNING_RATE, **given), period=period)

    return build


def _heavyball(name: str, mode: str | None, options: dict[str, Any]) -> Callable[[nn.Module], Stepper]:
    def build(net: nn.Module) -> Stepper:
        heavyball = import_module("heavyball")
        heavyball.utils.compile_mode = mode
        heavyball.utils.compile_mode_recommended_to_none = mode
        return OptimizerStepper(net, getattr(heavyball, name)(net.parameters(), lr=LEARNING_RATE, **options))

    return build


def _first_moves(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> list[bool]:
    """Return for each of the first steps whether it changed a random matrix, whose gradient is random, too."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 9, generator=generator))
    used = optimizer([weight])
    moved = []
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = torch.randn(6, 9, generator=generator)
        used.step()
        moved.append(not torch.equal(before, weight.detach()))
    return moved


def _stands_still() -> str:
    shampoo = import_module("pytorch_optimizer").Shampoo
    moved = _first_moves(lambda given: shampoo(given, lr=0.1, preconditioning_compute_steps=10), 12)
    still = moved.index(True)
    return f"wrong: its roots start at zero, so the first {still} steps change nothing" if still else ""


def _leaves_out_the_first_step() -> str:
    soap = import_module("pytorch_optimizer").SOAP
    moved = _first_moves(lambda given: soap(given, lr=0.1, weight_decay=0.0), 2)
    return "its first step changes nothing, as in the paper's code" if not moved[0] else ""
