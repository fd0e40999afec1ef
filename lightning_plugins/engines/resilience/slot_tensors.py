"""Tensors into a slot and out of it, without a serializer: each is copied once, straight to its place."""

import math
from collections.abc import Iterable
from mmap import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.slots import HEADER_BYTES, Place, aligned, encode_manifest, manifest_place
from lightning_plugins.engines.resilience.state_tree import Packed


class Layout(NamedTuple):
    """Where everything of one packed state goes.

    Attributes:
        tensors: place of each tensor, from the start of the data.
        skeleton: place of the skeleton, likewise.
        data_bytes: length of the data.
        draft: the manifest without checksums.
    """

    tensors: list[Place]
    skeleton: Place
    data_bytes: int
    draft: bytes

    @property
    def block_bytes(self) -> int:
        """How large a block has to be."""
        return sum(manifest_place(self.data_bytes, len(self.draft)))


def plan(packed: Packed, step: int, meta: dict[str, Any]) -> Layout:
    """Lay out a packed state.

    Args:
        packed: the state.
        step: its step.
        meta: plain values that travel with it: what JSON holds.

    Raises:
        InputError: if ``meta`` holds anything else.
    """
    offset = 0
    places = []
    for tensor in packed.tensors:
        places.append(Place(offset, tensor.numel() * tensor.element_size()))
        offset = aligned(offset + places[-1].bytes)
    skeleton = Place(offset, len(packed.skeleton))
    entries = [
        [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), *place]
        for tensor, place in zip(packed.tensors, places, strict=True)
    ]
    try:
        draft = encode_manifest({"step": step, "meta": meta, "skeleton": skeleton, "tensors": entries})
    except (TypeError, ValueError) as error:
        raise InputError(f"meta takes numbers, strings, None, lists and dicts of them: {error}") from error
    return Layout(places, skeleton, offset + len(packed.skeleton), draft)


def views_into(block: mmap, packed: Packed, layout: Layout) -> list[Tensor]:
    """Return the places of a block as tensors of the state's dtypes and shapes; they keep the block mapped."""
    return [
        _view(block, tensor.dtype, list(tensor.shape), place)
        for tensor, place in zip(packed.tensors, layout.tensors, strict=True)
    ]


def copy_into(views: list[Tensor], tensors: list[Tensor], numbers: Iterable[int]) -> None:
    """Copy some of the tensors to their places; those of accelerators are there only after ``finish_copies``."""
    for number in numbers:
        views[number].copy_(tensors[number], non_blocking=True)


def finish_copies(tensors: list[Tensor]) -> None:
    """Wait for the copies from accelerators."""
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        torch.get_device_module(device).synchronize(device)


def write_rest(block: mmap, packed: Packed, layout: Layout) -> None:
    """Write skeleton and draft."""
    start = HEADER_BYTES + layout.skeleton.offset
    block[start : start + layout.skeleton.bytes] = packed.skeleton
    offset, _ = manifest_place(layout.data_bytes, len(layout.draft))
    block[offset : offset + len(layout.draft)] = layout.draft


def read_packed(block: mmap, manifest: dict[str, Any]) -> Packed:
    """Return copies of what a checked block holds."""
    offset, length = manifest["skeleton"]
    skeleton = block[HEADER_BYTES + offset : HEADER_BYTES + offset + length]
    tensors = [_view(block, getattr(torch, dtype), shape, Place(*place)).clone() for dtype, shape, *place in manifest["tensors"]]
    return Packed(skeleton, tensors)


def _view(block: mmap, dtype: torch.dtype, shape: list[int], place: Place) -> Tensor:
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    octets = torch.frombuffer(block, dtype=torch.uint8, offset=HEADER_BYTES + place.offset, count=place.bytes)
    return octets.view(dtype).view(shape)
