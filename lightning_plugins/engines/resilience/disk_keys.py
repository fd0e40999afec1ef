"""What ``torch.distributed.checkpoint`` has to know of a step, its file ``.metadata``: which key lies where.

Keys are the paths of a nested state, joined by dots, as that package flattens one: dicts are opened, lists only where there are
tensors or dicts in them. The one private name of torch that this takes is the class of a place, ``_StorageInfo``; the reader of
torch finds it by that name in every ``.metadata``, so it has to stay.
"""

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

from lightning_plugins.engines.resilience.pieces import Path, pieces


class Record(NamedTuple):
    """Where one tensor or value lies: in which file, from which byte, and how many bytes long."""

    file: str
    offset: int
    bytes: int


class KeyTable:
    """Gathers keys and places, and makes the ``.metadata`` of them."""

    def __init__(self) -> None:
        self._kinds: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._paths: dict[str, Path] = {}

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
            state: nested dicts and lists; its ``pieces`` are chunks of whole tensors, whose paths have no prefix.
            tensors: those of it that have been written, each once.
            records: where each of them lies.
            save: writes any other value.
        """
        known = {_identity(tensor): record for tensor, record in zip(tensors, records, strict=True)}
        for path, value in _leaves(prefix, state):
            record = known.get(_identity(value)) if isinstance(value, Tensor) and value.layout == torch.strided else None
            if record is not None:
                self.add_tensor(path, value, record)
            else:
                self._add(path, BytesStorageMetadata(), None, save(value))
        for path, piece, shape, offset in pieces(state):
            self._add_chunk(path, piece, shape, offset, known[_identity(piece)])

    def add_tensor(self, path: Path, tensor: Tensor, record: Record) -> None:
        """Add a tensor that has been written."""
        origin = torch.Size([0] * tensor.dim())
        size = torch.Size(tensor.shape)
        kind = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [ChunkStorageMetadata(origin, size)])
        self._add(path, kind, origin, record)

    def metadata(self) -> bytes:
        """Return the file's content."""
        return pickle.dumps(Metadata(self._kinds, planner_data=self._paths, storage_data=self._places))

    def _add_chunk(self, path: Path, piece: Tensor, shape: torch.Size, offset: torch.Size, record: Record) -> None:
        """Add a part of a tensor that lies on several ranks; a part that several of them hold counts once."""
        key = ".".join(map(str, path))
        kind = self._kinds.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=piece.dtype), shape, []))
        self._paths[key] = path
        place = MetadataIndex(key, offset)
        if piece.numel() and place not in self._places:
            kind.chunks.append(ChunkStorageMetadata(offset, torch.Size(piece.shape)))
            self._places[place] = _StorageInfo(*record)

    def _add(self, path: Path, kind: Any, origin: torch.Size | None, record: Record) -> None:
        key = wanted = ".".join(map(str, path))
        number = 2
        while key in self._kinds:  # the keys 1 and "1" of one dict, for which torch refuses the whole state
            key, number = f"{wanted}#{number}", number + 1
        self._kinds[key] = kind
        self._paths[key] = path if key == wanted else (key,)
        self._places[MetadataIndex(key, origin)] = _StorageInfo(*record)


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
