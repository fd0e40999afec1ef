"""State of a rank in checkpoints: whether it fits, and what it becomes on another number of ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_plugins._support.errors import InputError


def check_fits(state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], ranks: int, ranks_per_node: int) -> None:
    """Refuse a state of another model or of other ranks.

    Raises:
        InputError: naming the first parameter that differs, or both numbers of ranks.
    """
    try:
        saved: Mapping[str, Sequence[int]] = state["shapes"]
        counts = (state["ranks"], state["ranks_per_node"])
    except (KeyError, TypeError) as error:
        raise InputError("this is no state of Ok-Topk; give what rank_state_dict returned") from error
    for name in [*shapes, *saved]:
        here, there = shapes.get(name), saved.get(name)
        if here is None or there is None or list(here) != list(there):
            raise InputError(
                f"the state is of another model: parameter {name} is {_shape(there)} in it and {_shape(here)} here; load the "
                "checkpoint into the model that it was saved from"
            )
    if counts[1] != ranks_per_node:
        raise InputError(
            f"the state was saved with ranks_per_node={counts[1]}, and here it is {ranks_per_node}, so that each rank holds "
            f"other parts of the gradient; give ranks_per_node={counts[1]}"
        )
    if counts[0] != ranks:
        raise InputError(
            f"the state is of {counts[0] * counts[1]} ranks, and there are {ranks * ranks_per_node}; merge_rank_states brings "
            "the states of all ranks to another number of ranks"
        )


def merge_rank_states(states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
    """Return the state of one of ``ranks`` ranks, made of those of other ranks.

    What waits on all ranks together, as the mean sees it, stays the same: the sum of the residuals over their number. New rank r
    takes over old ranks r, r + ranks, ... Thresholds and cuts are found anew.

    Args:
        states: of all old ranks that hold the same chunks, by rank.
        rank: of the new ranks.
        ranks: their number.
    """
    first = states[0]
    mine = states[rank::ranks]
    factor = ranks / len(states)
    residual = {}
    for name, like in first["residual"].items():
        total = like.new_zeros(like.shape)
        for state in mine:
            total += state["residual"][name]
        residual[name] = total * factor
    return {**first, "ranks": ranks, "rank": rank, "residual": residual, "cores": []}


def _shape(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a single number"
