"""What a step can tell of itself: norms, and how far the paper's assumption holds."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.selection import largest

if TYPE_CHECKING:
    from lightning_plugins.engines.sparse_allreduce.hook import OkTopkState


def measure(state: "OkTopkState", final: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return norms, where it is time for them, before anything is cleared.

    Args:
        state: of the hook; ``acc`` is residual plus gradient, ``residual`` still what it was.
        final: positions and sums of the step's result.
    """
    options, found = state.options, {}
    step = state.attempts + 1  # that this one will be: whoever logs counts it
    if options.measure_every and step % options.measure_every == 0:
        gradient_norm = float(torch.linalg.vector_norm(state.acc - state.residual))
        found["gradient_norm"] = gradient_norm
        found["residual_over_gradient"] = float(torch.linalg.vector_norm(state.residual)) / max(gradient_norm, 1e-30)
    if options.assumption_every and step % options.assumption_every == 0:
        update = torch.zeros_like(state.acc)
        for places, values in final:
            update[places] = values
        found["assumption_ratio"] = assumption_ratio(state.acc, state.residual, update, state.k, state.exchange)
    return found


def assumption_ratio(acc: Tensor, residual: Tensor, update: Tensor, k: int, exchange: Exchange) -> float:
    """Return the least xi that the step leaves to the paper's assumption 1.

        || top-k(mean of acc) - update / P ||  <=  xi || mean of gradients ||

    Args:
        acc: ``(n,)``, residual plus gradient of this rank.
        residual: ``(n,)``.
        update: ``(n,)``, the step's sum over ranks.
        k: of the step.
        exchange: the ranks; both means cost a dense reduction.
    """
    mean = exchange.add(acc.clone(), "assumption") / exchange.ranks
    gradient = exchange.add(acc - residual, "assumption") / exchange.ranks
    wanted = torch.zeros_like(mean)
    kept = largest(mean, k)[0]
    wanted[kept] = mean[kept]
    apart = float(torch.linalg.vector_norm(wanted - update / exchange.ranks))
    return apart / max(float(torch.linalg.vector_norm(gradient)), 1e-30)
