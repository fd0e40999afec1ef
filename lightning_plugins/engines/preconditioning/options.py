"""The options that all methods share, checked together and before anything is attached."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.preconditioning.blocks import MethodEntry
from lightning_plugins.engines.preconditioning.losses import check_form
from lightning_plugins.engines.preconditioning.methods import METHODS
from lightning_plugins.engines.preconditioning.settings import check_choice, check_count, check_positive

# Methods of norm layers, for methods that have none of their own.
NORMS = ("unit", "plain")


@dataclass(frozen=True)
class Options:
    """What a preconditioner does, whatever its method.

    Args:
        damping: added to the curvature, in the curvature's own units; None takes the method's default.
        factor_every: optimizer steps between two observations of curvature.
        inverse_every: optimizer steps between two refreshes of inverses, roots or bases; a multiple of ``factor_every``.
        warmup_steps: until then both happen at every step.
        fisher: ``empirical`` (the training's own gradients), ``mc`` (targets drawn from the prediction), ``exact`` (a backward
            pass a class) or ``forward`` (inputs alone); None takes the method's default.
        samples: targets drawn per term by ``mc``.
        loss: form of the loss (``cross_entropy``, ``squared_error``, ``binary_cross_entropy``) where its graph does not show it;
            then ``observe`` is given the logits.
        reduction: ``mean`` or ``sum`` over the terms, for a loss of unknown form; ``auto`` reads its last operation, and takes a
            loss of several parts for a mean.
        norms: method of norm layers where the chosen one has none: ``unit`` or ``plain``.
        ignore: parts of names of modules or parameters that keep the plain gradient.
        kl_clip: bound on the squared change of the model's distribution in a step, ``lr^2 <P, V>``; None does not bound it.
        match_norm: scale every layer's direction to the norm of its gradient.
        worker_fraction: share of ranks that keep each inverse.
        seed: of the targets drawn by ``mc`` and of methods that draw.
    """

    damping: float | None = None
    factor_every: int = 1
    inverse_every: int = 1
    warmup_steps: int = 10
    fisher: str | None = None
    samples: int = 1
    loss: str | None = None
    reduction: str = "auto"
    norms: str = "unit"
    ignore: Sequence[str] = ()
    kl_clip: float | None = None
    match_norm: bool = False
    worker_fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.damping is not None:
            check_positive("damping", self.damping)
        check_count("factor_every", self.factor_every)
        check_count("inverse_every", self.inverse_every)
        check_count("samples", self.samples)
        check_choice("reduction", self.reduction, ("auto", "mean", "sum"))
        check_choice("norms", self.norms, NORMS)
        if isinstance(self.ignore, str):
            raise InputError(f"ignore must be a list of parts of names, got {self.ignore!r}; write ignore=[{self.ignore!r}]")
        if self.inverse_every % self.factor_every:
            raise InputError(
                f"inverse_every must be a multiple of factor_every, got {self.inverse_every} and {self.factor_every}; "
                f"{self.factor_every * max(1, round(self.inverse_every / self.factor_every))} is the nearest"
            )
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if self.kl_clip is not None:
            check_positive("kl_clip", self.kl_clip)
        if self.loss is not None:
            check_form(self.loss)
        if not 0.0 < self.worker_fraction <= 1.0:
            raise InputError(
                f"worker_fraction must be in (0, 1], got {self.worker_fraction}; 1 keeps every inverse on every rank"
            )


def check_method(method: str, options: Options) -> tuple[MethodEntry, str]:
    """Return the method's line in the table and the Fisher type, or refuse what does not fit it."""
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; {nearest(method, METHODS)}")
    entry = METHODS[method]
    if options.fisher is not None and options.fisher not in entry.fishers:
        valid = f"valid are {', '.join(entry.fishers)}" if entry.fishers else "it looks at gradients alone; leave fisher out"
        raise InputError(f"{method} has no fisher={options.fisher!r}; {valid}")
    if entry.gradient_only and (options.kl_clip is not None or options.worker_fraction != 1.0):
        raise InputError(f"{method} looks at gradients alone and has no kl_clip or worker_fraction; leave them out")
    if entry.gradient_only and options.damping is not None:
        raise InputError(f"{method} has no damping, got {options.damping}; leave it out, or set epsilon where the method has one")
    if entry.couples_examples and (options.factor_every, options.inverse_every) != (1, 1):
        raise InputError(
            f"{method} is made of the examples of one step, so factor_every and inverse_every must be 1, got "
            f"{options.factor_every} and {options.inverse_every}; kfac and ekfac keep curvature over steps"
        )
    if entry.corrected and options.worker_fraction != 1.0:
        raise InputError(f"{method} needs its bases on every rank, so worker_fraction must be 1, got {options.worker_fraction}")
    return entry, options.fisher or (entry.fishers[0] if entry.fishers else "")


def split_options(method: str, given: dict[str, Any]) -> tuple[Options, Any]:
    """Return shared options and the method's own settings from keywords, refusing unknown ones."""
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; {nearest(method, METHODS)}")
    shared = {field.name for field in fields(Options)}
    own = {field.name for field in fields(METHODS[method].settings)}
    unknown = sorted(given.keys() - shared - own)
    if unknown:
        raise InputError(f"{method} has no option {unknown[0]!r}; {nearest(unknown[0], shared | own)}")
    return (
        Options(**{name: value for name, value in given.items() if name in shared}),
        METHODS[method].settings(**{name: value for name, value in given.items() if name in own}),
    )
