"""What ``torch.distributed.checkpoint`` has to know of a step, its file ``.metadata``: which key lies where.

Keys are the paths of a nested state, joined by dots, as that package flattens one: dicts are opened, lists only where there are
tensors or dicts in them. The one private name of torch that this takes is the class of a place, ``_StorageInfo``; the reader of
torch finds it by that name in every ``.metadata``, so it has to stay.
"""

import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_plugins.engines.resilience.shards import own_shard
from lightning_plugins.engines.resilience.tensor_pieces import PIECES, Path, pieces


class Record(NamedTuple):
    """Where one tensor or value lies: in which file, from which byte, and how many bytes long."""

    file: str
    offset: int
    bytes: int


class Entry(NamedTuple):
    """One tensor, piece of a tensor, or value.

    Attributes:
        path: keys that lead to it.
        dtype: without "torch."; empty for a value.
        shape: of what was written.
        record: where it lies.
        whole: shape of the tensor that it is a piece of; None for what is no piece.
        offset: of its first element in that tensor.
    """

    path: Path
    dtype: str
    shape: Sequence[int]
    record: Record
    whole: Sequence[int] | None = None
    offset: Sequence[int] = ()


class KeyTable:
    """Gathers keys and places, and makes the ``.metadata`` of them."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def add_state(
        self,
        prefix: Path,
        state: Any,
        tensors: Sequence[Tensor],
        records: Sequence[Record],
        save: Callable[[Any], Record],
    ) -> None:
        """Add all of a state.

        Args:
            prefix: that all its paths begin with.
            state: nested dicts and lists. Its ``tensor_pieces`` are chunks of whole tensors, whose paths have no prefix; where
                there are pieces, all else that rank 0 has is under paths without it, too.
            tensors: those of it that have been written, each once.
            records: where each of them lies.
            save: writes any other value.
        """
        first, parts = len(self._entries), list(pieces(state))
        known = {_identity(tensor): record for tensor, record in zip(tensors, records, strict=True)}
        for path, value in _leaves(prefix, state):
            record = known.get(_identity(value)) if isinstance(value, Tensor) and value.layout == torch.strided else None
            if record is not None:
                self.add_tensor(path, value, record)
            else:
                self._entries.append(Entry(path, "", (), save(value)))
        if parts and prefix == (own_shard(0),):
            apart = {path for path, *_ in parts} | {(PIECES,)}
            rest = [entry._replace(path=entry.path[1:]) for entry in self._entries[first:]]
            self._entries += [entry for entry in rest if entry.path not in apart]
        for path, piece, whole, offset in parts:
            self._entries.append(Entry(path, _name(piece), tuple(piece.shape), known[_identity(piece)], whole, offset))

    def add_tensor(self, path: Path, tensor: Tensor, record: Record) -> None:
        """Add a tensor that has been written."""
        self._entries.append(Entry(path, _name(tensor), tuple(tensor.shape), record))

    def plain(self) -> list[Any]:
        """Return all of it as what JSON holds, for ``add_plain`` of another process."""
        return [[list(field) if isinstance(field, tuple) else field for field in entry] for entry in self._entries]

    def add_plain(self, entries: Sequence[Any]) -> None:
        """Add what ``plain`` has returned."""
        for path, dtype, shape, record, whole, offset in entries:
            self._entries.append(Entry(tuple(path), dtype, shape, Record(*record), whole, offset))

    def metadata(self) -> bytes:
        """Return the file's content."""
        kinds: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        paths: dict[str, Path] = {}
        for entry in self._entries:
            key = wanted = ".".join(map(str, entry.path))
            number = 2
            while key in kinds and entry.whole is None:  # the keys 1 and "1" of one dict, for which torch refuses the whole state
                key, number = f"{wanted}#{number}", number + 1
            paths[key] = entry.path if key == wanted else (key,)
            kind = kinds.setdefault(key, _kind(entry))
            origin = torch.Size(entry.offset or [0] * len(entry.shape))
            place = MetadataIndex(key, origin if entry.dtype else None)
            if entry.whole is None:
                places[place] = _StorageInfo(*entry.record)
            elif math.prod(entry.shape) and place not in places:  # a piece that several ranks hold counts once
                kind.chunks.append(ChunkStorageMetadata(origin, torch.Size(entry.shape)))
                places[place] = _StorageInfo(*entry.record)
        return pickle.dumps(Metadata(kinds, planner_data=paths, storage_data=places))


def _kind(entry: Entry) -> Any:
    """Return what torch says of a value, a tensor, or the tensor of a piece, whose chunks are still to come."""
    if not entry.dtype:
        return BytesStorageMetadata()
    properties = TensorProperties(dtype=getattr(torch, entry.dtype))
    if entry.whole is not None:
        return TensorStorageMetadata(properties, torch.Size(entry.whole), [])
    size = torch.Size(entry.shape)
    return TensorStorageMetadata(properties, size, [ChunkStorageMetadata(torch.Size([0] * len(size)), size)])


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves((*path, str(key)), item)
    elif isinstance(value, list) and not _is_leaf(value):
        for number, item in enumerate(value):
            yield from _leaves((*path, number), item)
    else:
        yield path, value


def _is_leaf(value: Any) -> bool:
    if not isinstance(value, list):
        return not isinstance(value, Mapping | Tensor)
    return all(_is_leaf(item) for item in value)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return (storage, *view)
