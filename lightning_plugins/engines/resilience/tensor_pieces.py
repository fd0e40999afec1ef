"""States of which each rank holds pieces: of a tensor that is sharded over ranks, only the rank's own part is kept.

    state = take_apart(state)       # DTensors become plain local tensors
    state[PIECES]                   # [[["state_dict", "net.weight"], [1024, 64], [512, 0]], ...]: path, whole shape, offset
    whole = assemble([state of rank 0, state of rank 1, ...])

Paths are those of ``torch.distributed.checkpoint``: keys of dicts as text, places in lists as numbers. Where a piece lies in the
whole is asked of a private function of torch, since that package has it from there, too.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

PIECES = "memory_checkpoint_pieces"
_SHARDED = ("state_dict", "optimizer_states")

Path = tuple[str | int, ...]


def take_apart(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with plain tensors for DTensors, and a table of those that are pieces; nothing is copied or gathered.

    Args:
        state: what Lightning calls a checkpoint; it is not changed. Parameters and what optimizers keep of them may be pieces;
            elsewhere those DTensors become plain that every rank has whole, and others stay, for ``state_tree`` to refuse.
    """
    table: list[Any] = []
    taken = {name: _localized(value, (name,), table) if name in _SHARDED else _replicated(value) for name, value in state.items()}
    return {**taken, PIECES: table}


def pieces(state: Any) -> Iterator[tuple[Path, Tensor, torch.Size, torch.Size]]:
    """Yield path, local tensor, shape of the whole and offset in it for each piece of a state."""
    for path, shape, offset in state.get(PIECES, ()) if isinstance(state, Mapping) else ():
        value: Any = state
        for key in path:
            value = _child(value, key)
        yield tuple(path), value, torch.Size(shape), torch.Size(offset)


def assemble(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first state with whole tensors, of all ranks' pieces.

    Args:
        states: of every rank; the first one's containers are changed.
    """
    first: dict[str, Any] = {}
    wholes: dict[Path, Tensor] = {}
    for state in states:
        first = first or dict(state)
        for path, piece, shape, offset in pieces(state):
            whole = wholes.setdefault(path, torch.empty(shape, dtype=piece.dtype))
            whole[tuple(slice(start, start + size) for start, size in zip(offset, piece.shape, strict=True))] = piece
    for path, whole in wholes.items():
        *above, last = path
        container: Any = first
        for key in above:
            container = _child(container, key)
        container[_own_key(container, last)] = whole
    first.pop(PIECES, None)
    return first


def _localized(value: Any, path: Path, table: list[Any]) -> Any:
    if isinstance(value, DTensor):
        _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        local = value.to_local().detach()
        # A rank without any rows of a tensor has no place in it.
        table.append([list(path), list(value.shape), list(offset) if local.numel() else [0] * value.dim()])
        return local
    if isinstance(value, dict):
        return {key: _localized(item, (*path, str(key)), table) for key, item in value.items()}
    if isinstance(value, list):
        return [_localized(item, (*path, number), table) for number, item in enumerate(value)]
    return value


def _replicated(value: Any) -> Any:
    if isinstance(value, DTensor) and all(placement.is_replicate() for placement in value.placements):
        return value.to_local().detach()
    if type(value) is dict:
        return {key: _replicated(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replicated(item) for item in value)
    return value


def _child(container: Any, key: str | int) -> Any:
    return container[_own_key(container, key)]


def _own_key(container: Any, key: str | int) -> str | int:
    """Return a key as the container has it: optimizers number parameters, and paths have text."""
    return int(key) if isinstance(container, Mapping) and key not in container else key
