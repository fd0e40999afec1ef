"""What a loss is made of, read from its autograd graph: its form, its logits, its terms, and what multiplies it.

Second-order methods speak of the loss of *one term* (an example; a token where the loss averages over tokens). Autograd delivers
gradients of the whole: divided by the number of terms, by accumulation, multiplied by the scaler of mixed precision. All of these
are found here by one exact step: the gradient of the final scalar with respect to the loss node's output.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import statistics_dtype

Form = Literal["cross_entropy", "squared_error", "binary_cross_entropy"]
FORMS = ("cross_entropy", "squared_error", "binary_cross_entropy")

# What multiplies or reshapes a scalar without making it another loss.
_WRAPPERS = ("MulBackward", "DivBackward", "NegBackward", "ViewBackward", "ReshapeBackward", "SqueezeBackward", "ToCopyBackward",
             "CloneBackward", "AliasBackward", "UnsqueezeBackward")  # fmt: skip
# What stands between a log-softmax and the loss and leaves every log-probability in its place.
_RESHAPES = ("ViewBackward", "UnsqueezeBackward", "SqueezeBackward", "ReshapeAliasBackward", "ToCopyBackward")
_TINY = torch.finfo(torch.float32).tiny
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


@dataclass
class Loss:
    """A loss as second-order methods see it.

    Attributes:
        form: which of the known losses, or None.
        factor: what multiplies the loss on its way into the final scalar: 1 / accumulation, the scaler of mixed precision; 0
            says that the loss does not count, and then neither do its terms.
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
        """Return what the gradient of one of ``terms`` terms was multiplied by on its way into the final scalar.

        It is never negative: what is minimised is the loss with its sign. Without terms there is nothing to divide by.
        """
        factor = abs(self.factor)
        if not factor or not terms:
            return 1.0
        return factor / terms if self.mean else factor


def _name(node: Node | None) -> str:
    return "" if node is None else node.name().split("::")[-1].rstrip("0123456789")


def _signed(value: int) -> int:
    """Undo what torch's binding does to a negative number: it comes as 2^64 more."""
    return value - 2**64 if value >= 2**63 else value


def _below(node: Node) -> GradientEdge | None:
    """Return the edge to what a loss compares with its targets, or None if both or neither depend on the parameters."""
    edges = [GradientEdge(child, index) for child, index in node.next_functions if child is not None]
    return edges[0] if len(edges) == 1 else None


def _examples(values: Tensor) -> tuple[int, int]:
    """Return how many examples a prediction is of, and its entries per example."""
    examples = values.shape[0] if values.ndim else 1
    return examples, max(1, values.numel() // max(1, examples))


def _unwrapped(loss: Tensor) -> GradientEdge:
    """Return the node below multiplications and divisions by constants, reshapes, and reductions of one number.

    The node of compiled code has several outputs; the edge says which of them is the loss.
    """
    assert loss.grad_fn is not None
    edge = GradientEdge(loss.grad_fn, loss.output_nr)
    while _name(edge.node) in _WRAPPERS or _reduces_nothing(edge.node):
        inner = [GradientEdge(child, index) for child, index in edge.node.next_functions if child is not None]
        if len(inner) != 1:  # a product of two losses
            return edge
        edge = inner[0]
    return edge


def _reduces_nothing(node: Node) -> bool:
    """Whether a node is the mean or the sum of one number: ``loss.mean()`` of what was reduced before."""
    sizes: Any = getattr(node, "_saved_self_sym_sizes", None)
    return _name(node) in ("MeanBackward", "SumBackward") and sizes is not None and math.prod(sizes) == 1


def _factor(loss: Tensor, edge: GradientEdge) -> float:
    """Return d loss / d (output of a node): everything that stands above a scalar."""
    if edge.node is loss.grad_fn:
        return 1.0
    (factor,) = torch.autograd.grad(loss, edge, retain_graph=True)
    return float(factor)


def read_loss(loss: Tensor, reduction: str = "auto") -> Loss:
    """Read a scalar loss from the root of its autograd graph.

    Args:
        loss: a scalar with a graph, also one that was divided by accumulation or multiplied by a gradient scaler.
        reduction: ``mean`` or ``sum`` over the terms of a loss of unknown form; ``auto`` reads its last operation.

    Raises:
        InputError: if the loss has no graph.
    """
    if loss.grad_fn is None or loss.numel() != 1:
        raise InputError(
            f"the loss must be a scalar that depends on the parameters, got shape {tuple(loss.shape)} "
            f"{'without' if loss.grad_fn is None else 'with'} a graph; return loss.mean() computed from the module's output"
        )
    edge = _unwrapped(loss)
    node, factor = edge.node, _factor(loss, edge)
    name = _name(node)
    if name in ("NllLossBackward", "NllLossNdBackward", "NllLoss2DBackward"):
        read = _cross_entropy(node, name, factor)
    elif name in ("MseLossBackward", "BinaryCrossEntropyWithLogitsBackward"):
        read = _entrywise(node, name, factor)
    else:
        summed = name == "SumBackward" or _REDUCTIONS.get(getattr(node, "_saved_reduction", -1)) == "sum"
        read = Loss(None, factor, not summed, None, name)
    if read.form is None and reduction != "auto":
        read.mean = reduction == "mean"
    if not factor:
        read.terms = 0.0
    return read


def _cross_entropy(saved: Any, name: str, factor: float) -> Loss:
    """Read a negative log-likelihood: a term per target that is not ignored, as much of one as its class weighs."""
    chosen, target, class_weights = saved._saved_self, saved._saved_target, saved._saved_weight
    weights = (target != _signed(saved._saved_ignore_index)).to(statistics_dtype(chosen.dtype))
    if class_weights is not None:
        weights = weights * class_weights[target.clamp(0, len(class_weights) - 1)]
    terms = float(weights.sum())
    mean = _REDUCTIONS[saved._saved_reduction] == "mean"
    inner: Any = saved.next_functions[0][0]
    while _name(inner) in _RESHAPES:
        inner = inner.next_functions[0][0]
    if _name(inner) != "LogSoftmaxBackward":
        return Loss(None, factor, mean, terms, name)
    values = inner._saved_result
    axis = _classes_axis(values, _signed(inner._saved_dim), chosen)
    if axis is None:
        return Loss(None, factor, mean, terms, name)
    shape = [size for index, size in enumerate(values.shape) if index != axis]
    return Loss("cross_entropy", factor, mean, terms, name, _below(inner), values, weights.reshape(shape).unsqueeze(axis), axis)


def _classes_axis(values: Tensor, normalized: int, chosen: Tensor) -> int | None:
    """Return the axis of classes of log-probabilities, or None where a reshape on their way to the loss moved them.

    Args:
        values: what the log-softmax returned.
        normalized: the axis that it summed over.
        chosen: ``values`` as the loss saw them, after reshapes; torch makes an image of one row of a sequence or a volume.
    """
    axis = normalized % max(1, values.ndim)
    loss_axis = 1 if chosen.ndim > 1 else 0
    if values.shape[axis] != chosen.shape[loss_axis]:
        return None
    before = math.prod(values.shape[:axis]) == math.prod(chosen.shape[:loss_axis])
    return axis if before else None


def _entrywise(saved: Any, name: str, factor: float) -> Loss:
    """Read a loss that is a mean or a sum over entries: a term per example, the mean or the sum over the entries of it."""
    mean = _REDUCTIONS[saved._saved_reduction] == "mean"
    squared = name == "MseLossBackward"
    values = saved._saved_self
    if squared and saved.next_functions[0][0] is None:  # called with the target first, which torch allows
        values = saved._saved_target
    examples, entries = _examples(values)
    edge = _below(saved)
    if edge is None:
        return Loss(None, factor, mean, examples, f"{name} whose target depends on the parameters")
    if not squared and saved._saved_pos_weight is not None:
        return Loss(None, factor, mean, examples, f"{name} with pos_weight")
    curvature = _entry_curvature(values, 2.0 if squared else 1.0, entries if mean else 1)
    if not squared and saved._saved_weight is not None:
        curvature = curvature * saved._saved_weight
    form: Form = "squared_error" if squared else "binary_cross_entropy"
    return Loss(form, factor, mean, examples, name, edge, values, curvature)


def _entry_curvature(values: Tensor, curvature: float, entries: int) -> Tensor:
    return torch.full((), curvature / entries, dtype=statistics_dtype(values.dtype), device=values.device)


def given_loss(form: str, logits: Tensor) -> Loss:
    """Return the loss of a form that the user named, on logits that the user gave; the mean over its terms.

    Args:
        form: ``cross_entropy`` (classes on axis 1; one term per target, none of them ignored), ``squared_error`` or
            ``binary_cross_entropy`` (one term per example, the mean over its entries).
        logits: with their graph.

    Raises:
        InputError: for another form, logits without a graph, or without an axis of classes.
    """
    check_form(form)
    if logits.grad_fn is None:
        raise InputError("the logits have no graph; give the tensor that the module returned, not a detached copy")
    edge = GradientEdge(logits.grad_fn, logits.output_nr)
    values = logits.detach()
    if form == "cross_entropy":
        if values.ndim < 2:
            raise InputError(f"the logits of a cross-entropy must be (N, classes, ...), got shape {tuple(values.shape)}")
        terms = values.numel() / values.shape[1]
        return Loss("cross_entropy", 1.0, True, terms, form, edge, values.log_softmax(1), None, 1)
    known: Form = "squared_error" if form == "squared_error" else "binary_cross_entropy"
    examples, entries = _examples(values)
    curvature = _entry_curvature(values, 2.0 if known == "squared_error" else 1.0, entries)
    return Loss(known, 1.0, True, examples, form, edge, values, curvature)


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
            probabilities = values.exp()
            # The first of exponential clocks: multinomial() stops a GPU for good where a logit is NaN; this hands the NaN on.
            clocks = torch.empty_like(probabilities).exponential_(generator=generator).clamp_min_(_TINY)
            drawn = (probabilities / clocks).argmax(loss.classes_axis, keepdim=True)
            yield (probabilities - torch.zeros_like(probabilities).scatter_(loss.classes_axis, drawn, 1.0)) * weights.sqrt()
        elif loss.form == "squared_error":
            noise = torch.randn(values.shape, dtype=values.dtype, device=values.device, generator=generator)
            yield noise * weights.sqrt()
        else:
            probability = values.sigmoid()
            uniform = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=generator)
            yield (probability - (uniform < probability).to(values.dtype)) * weights.sqrt()


def exact_seeds(loss: Loss, *, positions_apart: bool = False) -> Iterator[Tensor]:
    """Yield the columns of a square root of the Hessian of the terms' losses at the logits: one backward pass a column.

    Args:
        loss: of a known form.
        positions_apart: whether the terms of one example (tokens, pixels) get columns of their own; else they share them, which
            is right only where every position of every layer belongs to one term.

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
            if not positions_apart or values.ndim <= 2:
                yield column
                continue
            moved = column.movedim(loss.classes_axis, 1)
            for position in range(moved[0, 0].numel()):
                alone = torch.zeros_like(moved).flatten(2)
                alone[..., position] = moved.flatten(2)[..., position]
                yield alone.view(moved.shape).movedim(1, loss.classes_axis)
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
    values = loss.values.detach().to(statistics_dtype(loss.values.dtype))
    return values, values.new_ones(()) if loss.weights is None else loss.weights


def check_positions_apart(loss: Loss, layer: str, examples: int) -> None:
    """Refuse a cross-entropy that hides which of its terms belong to one example: columns of their own cannot be made for them.

    Raises:
        InputError: if the logits are one row a term, and a layer saw several terms an example.
    """
    if loss.form != "cross_entropy" or loss.values is None or loss.values.ndim != 2:
        return
    terms = len(loss.values)
    if terms > examples and terms % examples == 0:
        raise InputError(
            f"fisher='exact' needs to know which terms belong to one example, and the cross-entropy has {terms} rows of logits "
            f"where {layer} saw {examples} examples; give it logits (examples, classes, positions), or use fisher='mc'"
        )
