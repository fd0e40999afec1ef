"""What a method would cost, layer by layer: floating-point operations and memory, before anything is trained.

The formulas, and what they count, are in ``cost_formulas.py``; here are the rows that a batch brings to a layer, and the table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.preconditioning.analysis.cost_formulas import (
    LAYER_FORMULAS,
    PARAMETER_FORMULAS,
    Counts,
    Seen,
    gram_solve,
)
from lightning_plugins.engines.preconditioning.blocks import statistics_dtype
from lightning_plugins.engines.preconditioning.layers import Layer, layer_of
from lightning_plugins.engines.preconditioning.methods import METHODS
from lightning_plugins.engines.preconditioning.options import Options, check_method, split_options
from lightning_plugins.engines.preconditioning.plan import make_plan


@dataclass(frozen=True)
class Cost:
    """What one layer, or one parameter of a method that looks at gradients alone, costs on one process.

    Attributes:
        name: of the layer or parameter; of a method that couples layers also of what they share.
        method: that preconditions it.
        shape: ``(B, O, I)`` of a layer, the bias being an input; the parameter's own shape otherwise.
        rows: examples times positions of the batch; 0 of a parameter.
        training_flop: forward and backward of one batch; of a parameter, those of the layer whose weight it is. The first layer
            needs a third less, for nothing asks for the gradient of the batch.
        statistics_flop: each time that curvature is observed, extra backward passes included.
        refresh_flop: each time that inverses, roots or bases are made.
        apply_flop: at each step.
        memory_bytes: kept from step to step.
        step_flop: of an average step, with the intervals of the options.
    """

    name: str
    method: str
    shape: tuple[int, ...]
    rows: int
    training_flop: float
    statistics_flop: float
    refresh_flop: float
    apply_flop: float
    memory_bytes: int
    step_flop: float


def count_costs(module: nn.Module, inputs: Tensor, method: str = "kfac", **options: Any) -> list[Cost]:
    """Count what preconditioning a module would cost, for one micro-batch a step.

    Args:
        module: runs once, without a graph; buffers and the random generators stay as they are.
        inputs: of a batch.
        method: name in ``METHODS``.
        options: as of :class:`~lightning_plugins.engines.preconditioning.preconditioner.GradientPreconditioner`.

    Raises:
        InputError: for an unknown name or option, one whose cost depends on more than shapes, or a method without a model of its
            costs.
    """
    shared, settings = split_options(method, options)
    fisher = check_method(method, shared)[1]
    if fisher == "exact":
        raise InputError("the passes of fisher='exact' depend on the loss; count fisher='mc' with samples= the number of classes")
    plan = make_plan(module, method, METHODS, shared.norms, shared.ignore)
    seen = _seen(module, inputs)
    costs = []
    for name, parameter, _ in plan.parameters:
        counts = _formula(method, PARAMETER_FORMULAS)(parameter.shape, settings)
        training = seen[id(parameter)].training_flop if id(parameter) in seen else 0.0
        costs.append(_cost(name, method, tuple(parameter.shape), 0, training, counts, parameter, shared))
    passes = shared.samples if fisher == "mc" else 1
    coupled: list[Seen] = []
    for layer, chosen in {id(layer): (layer, chosen) for _, layer, chosen in plan.layers}.values():
        brought = seen.get(id(layer.weight), Seen(layer))
        own = settings if chosen == method else METHODS[chosen].settings()
        counts = _formula(chosen, LAYER_FORMULAS)(brought, own, fisher, passes)
        if fisher == "mc":
            counts = counts._replace(statistics=counts.statistics + passes * brought.training_flop * 2 / 3)
        training = brought.training_flop
        costs.append(_cost(layer.name, chosen, layer.shape, brought.rows, training, counts, layer.weight, shared))
        coupled += [brought] if METHODS[chosen].joint else []
    if coupled:
        examples = passes * max(brought.examples for brought in coupled)
        solve, weight = gram_solve(examples, fisher), coupled[0].layer.weight
        costs.append(_cost("all layers", method, (examples, examples), 0, 0.0, solve, weight, shared))
    return costs


def format_costs(costs: Sequence[Cost]) -> str:
    """Return costs as aligned text, with their sum as the last line; operations in millions."""
    sums = [sum(getattr(cost, name) for cost in costs) for name in _SUMMED]
    rows: list[Sequence[str]] = [
        ("layer", "method", "shape", "rows", "training", "statistics", "refresh", "apply", "step", "step/training", "KiB"),
        *((c.name, c.method, str(c.shape), str(c.rows), *_numbers([getattr(c, name) for name in _SUMMED])) for c in costs),
        ("all", "", "", "", *_numbers(sums)),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(_aligned(row, widths)) for row in rows)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words (the first three columns) to the left, numbers to the right."""
    return [cell.rjust(w) if i > 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]


_SUMMED = ("training_flop", "statistics_flop", "refresh_flop", "apply_flop", "step_flop", "memory_bytes")


def _numbers(values: Sequence[float]) -> list[str]:
    *flop, memory_bytes = values
    training, step = flop[0], flop[-1]
    share = f"{step / training:.3f}" if training else "-"
    return [*(f"{value / 1e6:.2f}" for value in flop), share, f"{memory_bytes / 1024:.1f}"]


def _cost(
    name: str,
    method: str,
    shape: tuple[int, ...],
    rows: int,
    training: float,
    counts: Counts,
    weight: nn.Parameter,
    options: Options,
) -> Cost:
    statistics, refresh, apply, numbers = counts
    step = statistics / options.factor_every + refresh / options.inverse_every + apply
    memory_bytes = numbers * statistics_dtype(weight.dtype).itemsize
    return Cost(name, method, shape, rows, training, statistics, refresh, apply, memory_bytes, step)


def _formula(method: str, formulas: Mapping[str, Callable[..., Counts]]) -> Callable[..., Counts]:
    if method not in formulas:
        raise InputError(
            f"there is no model of the costs of {method!r}; {nearest(method, {**LAYER_FORMULAS, **PARAMETER_FORMULAS})}"
        )
    return formulas[method]


def _seen(module: nn.Module, inputs: Tensor) -> dict[int, Seen]:
    """Run the module once, and return what came to each weight, by the weight's id."""
    seen: dict[int, Seen] = {}

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(_module: nn.Module, given: tuple[Any, ...], _output: Any) -> None:
            shape, dtype = given[0].shape, given[0].dtype
            if layer.kind == "norm":
                examples, positions = shape[0], 1
            else:
                examples, positions = layer.inputs(torch.empty(shape, dtype=dtype, device="meta")).shape[1:3]
            old = seen.get(id(layer.weight), Seen(layer))
            rows = old.rows + examples * positions
            seen[id(layer.weight)] = Seen(old.layer, max(old.examples, examples), rows, old.averaged + examples)

        return note

    found = [(part, layer_of(name, part)) for name, part in module.named_modules()]
    handles = [part.register_forward_hook(hook(layer)) for part, layer in found if layer is not None]
    device = next(module.parameters()).device
    try:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            functional_call(module, buffers, (inputs.to(device),))
    finally:
        for handle in handles:
            handle.remove()
    return seen
