"""What a loss is made of, read from its autograd graph: its form, its logits, its terms, and what multiplies it.

Second-order methods speak of the loss of *one term* (an example; a token where the loss averages over tokens). Autograd delivers
gradients of the whole: divided by the number of terms, by accumulation, multiplied by the scaler of mixed precision. All of these
are found here by one exact step: the gradient of the final scalar with respect to the loss node's output.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_plugins._support.errors import InputError

Form = Literal["cross_entropy", "squared_error", "binary_cross_entropy"]
FORMS = ("cross_entropy", "squared_error", "binary_cross_entropy")

# What multiplies or reshapes a scalar without making it another loss.
_WRAPPERS = ("MulBackward", "DivBackward", "NegBackward", "ViewBackward", "ReshapeBackward", "SqueezeBackward", "ToCopyBackward",
             "CloneBackward", "AliasBackward", "UnsqueezeBackward")  # fmt: skip
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


@dataclass
class Loss:
    """A loss as second-order methods see it.

    Attributes:
        form: which of the known losses, or None.
        factor: what multiplies the loss on its way into the final scalar: 1 / accumulation, the scaler of mixed precision.
        mean: whether the loss is a mean over its terms; else their sum.
        terms: how many terms it has; None where the graph does not tell, and it is the number of examples that layers see.
        root: name of the graph's node, for messages.
        logits: edge of the graph at the logits (predictions), to differentiate from; None of an unknown form.
        values: the logits' values; of a cross-entropy log-probabilities, with ``classes_axis`` their axis.
        weights: weight of each term, broadcast over the logits; None is 1 for all.
        classes_axis: axis of classes of a cross-entropy.
    """

    form: Form | None
    factor: float
    mean: bool
    terms: float | None
    root: str
    logits: GradientEdge | None = None
    values: Tensor | None = None
    weights: Tensor | None = None
    classes_axis: int = -1

    def scale(self, terms: float) -> float:
        """Return what the gradient of one of ``terms`` terms was multiplied by on its way into the final scalar."""
        return self.factor / terms if self.mean else self.factor


def _name(node: Node | None) -> str:
    return "" if node is None else node.name().split("::")[-1].rstrip("0123456789")


def _below(node: Node) -> GradientEdge:
    """Return the edge to a node's first input."""
    child, index = node.next_functions[0]
    assert child is not None
    return GradientEdge(child, index)


def _unwrapped(loss: Tensor) -> Node:
    """Return the node below multiplications, divisions and reshapes by constants."""
    node = loss.grad_fn
    assert node is not None
    while _name(node) in _WRAPPERS:
        inner = [child for child, _ in node.next_functions if child is not None]
        if len(inner) != 1:  # a product of two losses
            return node
        node = inner[0]
    return node


def _factor(loss: Tensor, node: Node) -> float:
    """Return d loss / d (output of node): everything that stands above a scalar node."""
    if node is loss.grad_fn:
        return 1.0
    (factor,) = torch.autograd.grad(loss, GradientEdge(node, 0), retain_graph=True)
    return float(factor)


def read_loss(loss: Tensor) -> Loss:
    """Read a scalar loss from the root of its autograd graph.

    Args:
        loss: a scalar with a graph, also one that was divided by accumulation or multiplied by a gradient scaler.

    Raises:
        InputError: if the loss has no graph.
    """
    if loss.grad_fn is None or loss.numel() != 1:
        raise InputError(
            f"the loss must be a scalar that depends on the parameters, got shape {tuple(loss.shape)} "
            f"{'without' if loss.grad_fn is None else 'with'} a graph; return loss.mean() computed from the module's output"
        )
    node = _unwrapped(loss)
    factor = _factor(loss, node)
    name = _name(node)
    saved: Any = node
    if name in ("NllLossBackward", "NllLossNdBackward", "NllLoss2DBackward"):
        return _cross_entropy(saved, name, factor)
    if name == "MseLossBackward":
        values = saved._saved_self
        mean = _REDUCTIONS[saved._saved_reduction] == "mean"
        # A term is an example: its loss is the mean (or the sum) over the example's entries.
        curvature = torch.full((), 2.0 / values[0].numel() if mean else 2.0, dtype=values.dtype, device=values.device)
        return Loss("squared_error", factor, mean, len(values), name, _below(node), values, curvature)
    if name == "BinaryCrossEntropyWithLogitsBackward":
        return _binary(saved, node, name, factor)
    summed = name == "SumBackward" or _REDUCTIONS.get(getattr(saved, "_saved_reduction", -1)) == "sum"
    return Loss(None, factor, not summed, None, name)


def _cross_entropy(saved: Any, name: str, factor: float) -> Loss:
    log_probabilities, target = saved._saved_self, saved._saved_target
    axis = 1 if log_probabilities.ndim > 1 else 0
    weight = saved._saved_weight
    kept = target != saved._saved_ignore_index
    weights = kept.to(log_probabilities.dtype)
    if weight is not None:
        weights = weights * weight[target.clamp(0, len(weight) - 1)]
    terms = float(weights.sum())
    mean = _REDUCTIONS[saved._saved_reduction] == "mean"
    below = [child for child, _ in saved.next_functions if child is not None]
    inner: Any = below[0] if below else None
    while _name(inner) in ("ViewBackward", "UnsqueezeBackward", "SqueezeBackward", "ReshapeAliasBackward", "ToCopyBackward"):
        inner = inner.next_functions[0][0]
    if _name(inner) != "LogSoftmaxBackward":
        return Loss(None, factor, mean, terms, name)
    values = inner._saved_result
    if values.shape != log_probabilities.shape:  # one axis of positions: torch makes an image of one row of it
        weights = weights.reshape(values.shape[:1] + values.shape[2:])
    edge = _below(inner)
    return Loss("cross_entropy", factor, mean, terms, name, edge, values, weights.unsqueeze(axis), axis)


def _binary(saved: Any, node: Node, name: str, factor: float) -> Loss:
    values = saved._saved_self
    mean = _REDUCTIONS[saved._saved_reduction] == "mean"
    if saved._saved_pos_weight is not None:
        return Loss(None, factor, mean, len(values), f"{name} with pos_weight")
    curvature = torch.full((), 1.0 / values[0].numel() if mean else 1.0, dtype=values.dtype, device=values.device)
    if saved._saved_weight is not None:
        curvature = curvature * saved._saved_weight
    return Loss("binary_cross_entropy", factor, mean, len(values), name, _below(node), values, curvature)


def given_loss(form: str, logits: Tensor) -> Loss:
    """Return the loss of a form that the user named, on logits that the user gave; the mean over its terms.

    Args:
        form: ``cross_entropy`` (classes on axis 1; one term per target), ``squared_error`` or
            ``binary_cross_entropy`` (one term per example, the mean over its entries).
        logits: with their graph.

    Raises:
        InputError: for another form, or logits without a graph.
    """
    check_form(form)
    if logits.grad_fn is None:
        raise InputError("the logits have no graph; give the tensor that the module returned, not a detached copy")
    edge = GradientEdge(logits.grad_fn, logits.output_nr)
    values = logits.detach()
    if form == "cross_entropy":
        terms = values.numel() / values.shape[1]
        return Loss("cross_entropy", 1.0, True, terms, form, edge, values.log_softmax(1), None, 1)
    per_entry = (2.0 if form == "squared_error" else 1.0) / values[0].numel()
    curvature = torch.full((), per_entry, dtype=values.dtype, device=values.device)
    known: Form = "squared_error" if form == "squared_error" else "binary_cross_entropy"
    return Loss(known, 1.0, True, len(values), form, edge, values, curvature)


def check_form(form: str) -> None:
    """Refuse what is not a form of a loss."""
    if form not in FORMS:
        raise InputError(f"loss must be one of {', '.join(FORMS)}, got {form!r}")


def sampled_seeds(loss: Loss, samples: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yield ``samples`` gradients of the terms' losses at the logits, for targets drawn from the model's own prediction.

    Their outer products average to the Fisher matrix of one term, times the number of terms.

    Raises:
        InputError: if the loss has no such form.
    """
    values, weights = _known(loss, "mc")
    for _ in range(samples):
        if loss.form == "cross_entropy":
            probabilities = values.exp().movedim(loss.classes_axis, -1)
            drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator).view(probabilities.shape[:-1])
            one_hot = torch.nn.functional.one_hot(drawn, probabilities.shape[-1]).to(values.dtype)
            yield (probabilities - one_hot).movedim(-1, loss.classes_axis) * weights.sqrt()
        elif loss.form == "squared_error":
            noise = torch.randn(values.shape, dtype=values.dtype, device=values.device, generator=generator)
            yield noise * weights.sqrt()
        else:
            probability = values.sigmoid()
            uniform = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=generator)
            yield (probability - (uniform < probability).to(values.dtype)) * weights.sqrt()


def exact_seeds(loss: Loss) -> Iterator[Tensor]:
    """Yield the columns of a square root of the Hessian of the terms' losses at the logits: one backward pass a column.

    Raises:
        InputError: if the loss has no such form.
    """
    values, weights = _known(loss, "exact")
    if loss.form == "cross_entropy":
        probabilities = values.exp()
        roots = (probabilities * weights).sqrt()
        for index in range(values.shape[loss.classes_axis]):
            column = -probabilities * roots.select(loss.classes_axis, index).unsqueeze(loss.classes_axis)
            column.select(loss.classes_axis, index).add_(roots.select(loss.classes_axis, index))
            yield column
        return
    curvature = weights.expand_as(values).clone()
    if loss.form == "binary_cross_entropy":
        probability = values.sigmoid()
        curvature = curvature * probability * (1.0 - probability)
    roots = curvature.sqrt().flatten(1) if values.ndim > 1 else curvature.sqrt().unsqueeze(1)
    for index in range(roots.shape[1]):
        column = torch.zeros_like(roots)
        column[:, index] = roots[:, index]
        yield column.view(values.shape)


def _known(loss: Loss, fisher: str) -> tuple[Tensor, Tensor]:
    if loss.form is None or loss.values is None:
        raise InputError(
            f"fisher={fisher!r} needs a loss whose form is known, and the root of this one's graph is {loss.root}; valid are "
            f"{', '.join(FORMS)} from torch.nn.functional: name the form with loss= and give logits=, or use fisher='empirical'"
        )
    weights = torch.ones((), dtype=loss.values.dtype, device=loss.values.device) if loss.weights is None else loss.weights
    return loss.values, weights
