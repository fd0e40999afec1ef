"""Sparse entries as bytes: three codes of the positions, two of the values.

A message holds sorted positions inside a span and their values, as ``values | positions | padding to 8 bytes``:

    int32    4 bytes a position, relative to the span's start
    delta16  2 bytes: distance to the position before; a longer way is walked in entries of value 0
    bitmap   a bit for each place of the span

Values are the tensor's own (4 or 8 bytes), or bfloat16 (2 bytes). The number of entries and the code travel ahead, in one
integer, ``header``. Decoding drops values of 0: fillers, and what bfloat16 has rounded to nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CODES = ("int32", "delta16", "bitmap")
FARTHEST = 0xFFFF  # what a 16-bit distance can say
MOST_ELEMENTS = 1 << 32  # of a span: what a position of 32 bits, read without a sign, can say
ALIGNMENT = 8  # of every message, so that bytes can be read as numbers where they lie
_BFLOAT16_MAX = float(torch.finfo(torch.bfloat16).max)


@dataclass(frozen=True)
class Wire:
    """How entries are written.

    Args:
        indices: ``int32``, ``delta16``, ``bitmap``, or ``auto``: the shortest for each message.
        values: ``exact`` or ``bfloat16``.
        dtype: of the values before and after, ``float32`` or ``float64``.
    """

    indices: str
    values: str
    dtype: torch.dtype

    def rounded(self, values: Tensor) -> Tensor:
        """Return what arrives of ``values``; what is lost is exactly ``values - rounded``, in their own type."""
        return values if self.values == "exact" else self._quantized(values).to(self.dtype)

    def encode(self, indices: Tensor, values: Tensor, start: int, span: int) -> tuple[int, Tensor]:
        """Return header and bytes of a message.

        Args:
            indices: ``(c,)`` sorted, in ``[start, start + span)``.
            values: ``(c,)``, already ``rounded``.
            start: first position of the span, known to the receiver.
            span: its length, up to ``MOST_ELEMENTS``, known to the receiver.
        """
        positions = indices - start
        code = self._shortest(positions, span) if self.indices == "auto" else self.indices
        if code == "delta16":
            positions, values = _with_fillers(positions, values)
            coded = torch.diff(positions, prepend=positions.new_zeros(1)).to(torch.int32).to(torch.int16)
        elif code == "bitmap":
            coded = _pack_bits(positions, span)
        else:
            coded = positions.to(torch.int32)
        message = torch.cat([_bytes_of(self._quantized(values)), _bytes_of(coded)])
        padding = -len(message) % ALIGNMENT
        if padding:
            message = torch.cat([message, message.new_zeros(padding)])
        return len(values) * len(CODES) + CODES.index(code), message

    @staticmethod
    def entries(header: int) -> int:
        """Return how many entries a header announces, fillers among them."""
        return header // len(CODES)

    def message_bytes(self, header: int, span: int) -> int:
        """Return how many bytes follow a header."""
        count, code = divmod(header, len(CODES))
        length = count * self._value_bytes + self._position_bytes(CODES[code], count, span)
        return length + -length % ALIGNMENT

    def decode(self, header: int, message: Tensor, start: int, span: int) -> tuple[Tensor, Tensor]:
        """Return the indices, ``(c,)`` sorted ``int64``, and the values, ``(c,)``, none of them zero."""
        count, code = divmod(header, len(CODES))
        split = count * self._value_bytes
        values = message[:split].view(torch.bfloat16 if self.values == "bfloat16" else self.dtype).to(self.dtype)
        coded = message[split : split + self._position_bytes(CODES[code], count, span)]
        if CODES[code] == "int32" and split % 4:
            coded = coded.clone()  # after an odd number of bfloat16 the positions do not lie where numbers of 4 bytes can be read
        if CODES[code] == "delta16":
            positions = (coded.view(torch.int16).to(torch.int64) & FARTHEST).cumsum(0)
        elif CODES[code] == "bitmap":
            positions = _unpack_bits(coded, span)
        else:
            positions = coded.view(torch.int32).to(torch.int64) & (MOST_ELEMENTS - 1)
        kept = values != 0
        if not bool(kept.all()):
            positions, values = positions[kept], values[kept]
        return positions + start, values

    @property
    def _value_bytes(self) -> int:
        return 2 if self.values == "bfloat16" else self.dtype.itemsize

    def _quantized(self, values: Tensor) -> Tensor:
        if self.values == "exact":
            return values
        # The largest float32 would round to infinity; what is infinite has to stay so, for others to see it.
        clamped = values.clamp(-_BFLOAT16_MAX, _BFLOAT16_MAX)
        return torch.where(values.isinf(), values, clamped).to(torch.bfloat16)

    def _shortest(self, positions: Tensor, span: int) -> str:
        count = len(positions)
        fillers = int(_filler_counts(positions).sum())
        lengths = {
            "int32": self._position_bytes("int32", count, span),
            "delta16": self._position_bytes("delta16", count + fillers, span) + fillers * self._value_bytes,
            "bitmap": self._position_bytes("bitmap", count, span),
        }
        return min(lengths, key=lambda code: lengths[code])

    @staticmethod
    def _position_bytes(code: str, count: int, span: int) -> int:
        if code == "bitmap":
            return -(-span // 8)
        return count * (4 if code == "int32" else 2)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _filler_counts(positions: Tensor) -> Tensor:
    """Return how many entries of value 0 have to stand before each position."""
    gaps = torch.diff(positions, prepend=positions.new_zeros(1))
    return ((gaps - 1).clamp(min=0)).div(FARTHEST, rounding_mode="floor")


def _with_fillers(positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    fillers = _filler_counts(positions)
    if not bool(fillers.any()):
        return positions, values
    ends = (fillers + 1).cumsum(0)  # where each entry stands among its fillers
    total = int(ends[-1])
    before = torch.cat([positions.new_zeros(1), positions[:-1]])
    owner = torch.repeat_interleave(torch.arange(len(positions), device=positions.device), fillers + 1)
    ahead = torch.arange(total, device=positions.device) - (ends - fillers - 1)[owner] + 1
    walked = before[owner] + ahead * FARTHEST
    spread = values.new_zeros(total)
    walked[ends - 1], spread[ends - 1] = positions, values
    return walked, spread


def _pack_bits(positions: Tensor, span: int) -> Tensor:
    if positions.device.type == "cpu":
        marks = np.zeros(span, dtype=np.bool_)
        marks[positions.numpy()] = True
        return torch.from_numpy(np.packbits(marks, bitorder="little"))
    bits = torch.zeros(-(-span // 8) * 8, dtype=torch.uint8, device=positions.device)
    bits[positions] = 1
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=positions.device)
    return (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, span: int) -> Tensor:
    if packed.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(np.unpackbits(packed.numpy(), count=span, bitorder="little")))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] & weights) != 0).flatten()[:span].nonzero().flatten()
