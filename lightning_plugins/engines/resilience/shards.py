"""What of a rank's state all replicas have alike: it is captured once a node, and only the rest by every rank.

Alike are the parameters and what optimizers keep of them, nearly all of the bytes. Buffers, schedulers, callbacks and loops are
each rank's own: statistics of batches and losses that are not synchronized differ from rank to rank.
"""

from collections.abc import Set
from typing import Any

SHARED = "shared"


def own_shard(rank: int) -> str:
    """Return the name of what a rank has for itself."""
    return f"rank{rank}"


def split(state: dict[str, Any], parameters: Set[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a replica's state in two parts: what all replicas have alike, and what is this rank's.

    Args:
        state: as ``OpenedLoop.take`` returns it; it is not changed.
        parameters: names of the module's parameters; None if each rank holds pieces, so that nothing is alike.
    """
    if parameters is None:
        return {"state_dict": {}, "optimizer_states": [{} for _ in state["optimizer_states"]]}, state
    weights, optimizers = state["state_dict"], state["optimizer_states"]
    shared = {
        "state_dict": {name: value for name, value in weights.items() if name in parameters},
        "optimizer_states": [optimizer["state"] for optimizer in optimizers],
    }
    own = {
        **state,
        "state_dict": {name: value for name, value in weights.items() if name not in parameters},
        "optimizer_states": [{name: value for name, value in optimizer.items() if name != "state"} for optimizer in optimizers],
    }
    return shared, own


def join(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Undo ``split``, but for the order of a module's buffers among its parameters."""
    pairs = zip(own["optimizer_states"], shared["optimizer_states"], strict=True)
    return {
        **own,
        "state_dict": {**shared["state_dict"], **own["state_dict"]},
        "optimizer_states": [{"state": states, **rest} for rest, states in pairs],
    }
