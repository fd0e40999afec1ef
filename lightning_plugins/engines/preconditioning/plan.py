"""Which parameter is preconditioned by what, decided once for a module, with the reason where the answer is nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.preconditioning.blocks import MethodEntry
from lightning_plugins.engines.preconditioning.layers import Layer, layer_of

PLAIN = "plain gradient"


@dataclass(frozen=True)
class Assignment:
    """A line of the table that is shown at the start.

    Attributes:
        parameter: its name in the module.
        shape: its shape.
        method: of the table, or ``plain gradient``.
        reason: why it is plain; empty otherwise.
    """

    parameter: str
    shape: tuple[int, ...]
    method: str
    reason: str = ""


@dataclass
class Plan:
    """What a module's parameters are preconditioned by.

    Attributes:
        layers: ``(tapped module, layer, method)``; modules that share a weight share a layer.
        parameters: ``(name, parameter, method)`` of a method that looks at gradients alone.
        table: a line per parameter.
    """

    layers: list[tuple[nn.Module, Layer, str]]
    parameters: list[tuple[str, nn.Parameter, str]]
    table: list[Assignment]


def make_plan(module: nn.Module, method: str, entries: dict[str, MethodEntry], norms: str, ignore: Sequence[str]) -> Plan:
    """Assign a method to every parameter of ``module`` that can have one.

    Args:
        method: name in ``entries``.
        norms: method of the norm layers where ``method`` has none for them, or ``plain``.
        ignore: parts of names of modules and parameters that keep the plain gradient.

    Raises:
        InputError: if nothing is left to precondition.
    """
    entry = entries[method]
    reasons: dict[int, str] = {}
    methods: dict[int, str] = {}
    plan = Plan([], [], [])
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    unfit = _unfit(module)
    known = [*names.values(), *(name for name, _ in module.named_modules() if name)]
    for part in ignore:
        if not any(part in name for name in known):
            raise InputError(f"ignore={part!r} is part of no name in {type(module).__name__}; {nearest(part, known)}")

    def ignored(name: str) -> bool:
        return any(part in name for part in ignore)

    if entry.gradient_only:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                reasons[id(parameter)] = "frozen"
            elif ignored(name):
                reasons[id(parameter)] = "ignored by name"
            elif reason := entry.refuses(parameter) or unfit.get(id(parameter), ""):
                reasons[id(parameter)] = reason
            else:
                plan.parameters.append((name, parameter, method))
                methods[id(parameter)] = method
    else:
        owners: dict[int, Layer] = {}
        kinds = _kinds_by_weight(module)
        for name, part in module.named_modules(remove_duplicate=True):
            layer = layer_of(name, part)
            if layer is None:
                continue
            chosen = method if layer.kind in entry.kinds else norms if layer.kind == "norm" else "plain"
            skipped = ignored(name) or any(ignored(names.get(id(parameter), "")) for parameter in layer.parameters)
            reason = "ignored by name" if skipped else _refusal(layer, chosen, owners, names, method)
            reason = reason or next((unfit[id(p)] for p in layer.parameters if id(p) in unfit), "")
            if not reason and len(kinds[id(layer.weight)]) > 1:
                reason = f"layers of kinds {' and '.join(sorted(kinds[id(layer.weight)]))} share its weight"
            if reason:
                reasons.update({id(parameter): reason for parameter in layer.parameters if id(parameter) not in methods})
                continue
            layer = owners.setdefault(id(layer.weight), layer)
            plan.layers.append((part, layer, chosen))
            methods.update({id(parameter): chosen for parameter in layer.parameters})
    for name, parameter in module.named_parameters():
        used = methods.get(id(parameter), PLAIN)
        reason = "" if used != PLAIN else reasons.get(id(parameter), "no layer of a kind that the method knows")
        plan.table.append(Assignment(name, tuple(parameter.shape), used, reason))
    if not methods:
        why = "; ".join(f"{line.parameter}: {line.reason}" for line in plan.table[:3]) or "it has no parameters"
        raise InputError(
            f"{type(module).__name__} has nothing for {method} to precondition ({why}); it needs "
            f"{'trainable matrices' if entry.gradient_only else 'trainable layers of kind ' + ', '.join(entry.kinds)}"
        )
    return plan


def _unfit(module: nn.Module) -> dict[int, str]:
    """Return why a parameter cannot be preconditioned by any method, by its id."""
    found = {}
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            found[id(part.weight)] = "its gradients are sparse"
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(f"{name} has no shape yet; run one batch through the module first, then attach")
        if parameter.is_complex():
            found[id(parameter)] = "complex"
        elif parameter.numel() == 0:
            found[id(parameter)] = "empty"
    return found


def _kinds_by_weight(module: nn.Module) -> dict[int, set[str]]:
    """Return the kinds of layers that have a weight, by its id: an embedding and an output layer often share theirs."""
    kinds: dict[int, set[str]] = {}
    for name, part in module.named_modules():
        layer = layer_of(name, part)
        if layer is not None:
            kinds.setdefault(id(layer.weight), set()).add(layer.kind)
    return kinds


def _refusal(layer: Layer, chosen: str, owners: dict[int, Layer], names: dict[int, str], method: str) -> str:
    """Return why a layer keeps the plain gradient, or nothing."""
    frozen = [names.get(id(parameter), layer.name) for parameter in layer.parameters if not parameter.requires_grad]
    if frozen:
        return "frozen" if len(frozen) == len(layer.parameters) else f"{frozen[0]} is frozen, and the layer is taken as a whole"
    if chosen == "plain":
        return f"{method} has no form for layers of kind {layer.kind}"
    owner = owners.get(id(layer.weight))
    if owner is not None and owner.bias is not layer.bias:
        return f"its weight is shared with {owner.name}, and its bias is not"
    return ""


def format_table(table: Sequence[Assignment]) -> str:
    """Return the table as aligned text."""
    rows: list[Sequence[Any]] = [
        ("parameter", "shape", "method", ""),
        *((a.parameter, a.shape, a.method, a.reason) for a in table),
    ]
    widths = [max(len(str(row[column])) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    )
