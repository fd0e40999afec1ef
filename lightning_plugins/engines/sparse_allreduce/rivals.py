"""Other ways to sum the large entries of all ranks, behind the signature of ``sparse_allreduce``: what it is compared with.

Words of 4 bytes that a rank sends, n elements, k selected, P ranks, in float32 (an entry is a position and a value, 2 words):

    dense_allreduce        2 n (P-1)/P
    topk_allgather         2 k (P-1)
    topk_dsa               4 k (P-1)/P .. (2 k + n) (P-1)/P
    gtopk_allreduce        2 k log2 P, and as many received before, at the root of its tree
    gaussian_k_allgather   2 k' (P-1), k' what the fitted threshold selects

They are baselines: entries travel as int32 and exact values, mass is conserved as in ours, bytes are counted as in ours. They do
not ask whether the ranks agree, and do not look for what is not finite; unlike ours, only this rank refuses bad arguments.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce.allreduce import sparse_allreduce, why_not
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.selection import largest, select, trim
from lightning_plugins.engines.sparse_allreduce.state import SparseAllreduceState
from lightning_plugins.engines.sparse_allreduce.wire import ALIGNMENT, Wire

FIT_CORRECTIONS = 4
FIT_BAND = (2.0 / 3.0, 4.0 / 3.0)  # of k
DENSE = -1  # header of a piece that is not sparse


def dense_allreduce(
    acc: Tensor, k: int, *, state: SparseAllreduceState | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the sum of everything, and leave zeros in ``acc``: 2 n (P-1)/P words, by the group's own all-reduce.

    Args:
        acc: any shape, ``float32`` or ``float64``, contiguous; changed in place.
        k: of no effect.
        state: counts the bytes.
        group: the ranks; None is the default group.

    Raises:
        InputError: if the arguments cannot be used.
    """
    flat, exchange = _opened(acc, k, state, group)
    total = exchange.add(flat.clone(), "dense")
    flat.zero_()
    return total.view_as(acc)


def topk_allgather(
    acc: Tensor, k: int, *, state: SparseAllreduceState | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the sum of each rank's k largest entries, which go to every rank: 2 k (P-1) words. Known as TopkA.

    Paper: Renggli et al., "SparCML", SC 2019, compares with it; the selection is that of Aji and Heafield, EMNLP 2017. The result
    has up to P k entries. More than a dense sum from P = n / k on.

    Args:
        acc: any shape, ``float32`` or ``float64``, contiguous; changed in place: what was selected becomes 0.
        k: entries of each rank.
        state: counts the bytes.
        group: the ranks; None is the default group.

    Raises:
        InputError: if the arguments cannot be used.
    """
    flat, exchange = _opened(acc, k, state, group)
    return _gathered(flat, largest(flat, k)[0], exchange).view_as(acc)


def gaussian_k_allgather(
    acc: Tensor, k: int, *, state: SparseAllreduceState | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the sum of what is above each rank's threshold, fitted with a normal distribution: 2 k' (P-1) words.

    Paper: Shi et al., "Understanding Top-k Sparsification in Distributed Deep Learning", arXiv 1911.08772. The threshold is where
    a normal distribution of mean 0 and the vector's second moment has k / n of its mass outside; while the count is not within
    2/3 and 4/3 of k it is halved or raised by a half, at most four times. Few outliers widen the fit so much that the count
    still is far from k, and nothing bounds it.

    Args:
        acc: any shape, ``float32`` or ``float64``, contiguous; changed in place: what was selected becomes 0.
        k: entries that each rank aims at.
        state: counts the bytes.
        group: the ranks; None is the default group.

    Raises:
        InputError: if the arguments cannot be used.
    """
    flat, exchange = _opened(acc, k, state, group)
    return _gathered(flat, select(flat, fitted_threshold(flat, k)), exchange).view_as(acc)


def fitted_threshold(acc: Tensor, k: int) -> float:
    """Return the magnitude that about ``k`` entries of a normal distribution would reach, corrected by counting."""
    share = min(k / len(acc), 1.0)
    deviation = float(acc.double().square().mean().sqrt())
    threshold = deviation * math.sqrt(2.0) * float(torch.erfinv(torch.tensor(1.0 - share, dtype=torch.float64)))
    for _ in range(FIT_CORRECTIONS):
        count = int((acc.abs() >= threshold).sum())
        if count < FIT_BAND[0] * k:
            threshold *= 0.5
        elif count > FIT_BAND[1] * k:
            threshold *= 1.5
        else:
            break
    return threshold


def topk_dsa(acc: Tensor, k: int, *, state: SparseAllreduceState | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of each rank's k largest entries by way of owners of equal parts of the vector, keeping all entries.

    Paper: Renggli et al., "SparCML: High-Performance Sparse Communication for Machine Learning", SC 2019, its split allgather. A
    part's sum travels dense where that is shorter, so 4 k (P-1)/P words where all supports are alike, (2 k + n) (P-1)/P where
    the sum has become dense. Parts have n / P elements each, wherever the entries lie.

    Args:
        acc: any shape, ``float32`` or ``float64``, contiguous; changed in place: what was selected becomes 0.
        k: entries of each rank.
        state: counts the bytes.
        group: the ranks; None is the default group.

    Raises:
        InputError: if the arguments cannot be used.
    """
    flat, exchange = _opened(acc, k, state, group)
    chosen = largest(flat, k)[0]
    values = flat[chosen]
    flat[chosen] = 0
    ranks, rank = exchange.ranks, exchange.rank
    cuts = [len(flat) * cut // ranks for cut in range(ranks + 1)]
    spans = [end - start for start, end in pairwise(cuts)]
    inner = torch.searchsorted(chosen, torch.tensor(cuts[1:-1], dtype=torch.int64, device=chosen.device)).tolist()
    parts = zip(chosen.tensor_split(inner), values.tensor_split(inner), cuts[:-1], spans, strict=True)
    sent = [_packed(places - start, of_part, span) for places, of_part, start, span in parts]
    headers = [header for (header,) in exchange.all_to_all_integers([[header] for header, _ in sent], "counts")]
    lengths = [_packed_bytes(header, spans[rank], acc.dtype) for header in headers]
    mine = flat.new_zeros(spans[rank])
    messages = exchange.all_to_all_bytes([message for _, message in sent], lengths, "split_and_reduce")
    for header, message in zip(headers, messages, strict=True):
        _unpack_onto(mine, header, message)
    touched = mine.nonzero().flatten()
    header, message = _packed(touched, mine[touched], spans[rank])
    headers = [header for (header,) in exchange.all_gather_integers([header], "counts")]
    lengths = [_packed_bytes(header, span, acc.dtype) for header, span in zip(headers, spans, strict=True)]
    result = torch.zeros_like(flat)
    pieces = zip(result.split(spans), headers, _ring_allgather(message, lengths, exchange, "allgather"), strict=True)
    for part, header, message in pieces:
        _unpack_onto(part, header, message)
    return result.view_as(acc)


def gtopk_allreduce(
    acc: Tensor, k: int, *, state: SparseAllreduceState | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return about the k largest sums, found in a tree that keeps k at every node. Known as gTopk.

    The root gets 2 k log2 P words and then sends as many, one message after the other: 4 k log2 P in the time of a step.

    Paper: Shi et al., "A Distributed Synchronous SGD Algorithm with Global Top-k Sparsification for Low Bandwidth Networks",
    ICDCS 2019. We are kinder to it in three ways: any number of ranks will do; a position and a float32 take 8 bytes together;
    and what a node has dropped of a position that is in the result after all, by another branch, goes into that node's residual,
    where the paper loses it.

    Args:
        acc: any shape, ``float32`` or ``float64``, contiguous; changed in place: what was sent and is in the result becomes 0.
        k: entries of each rank, and of the result.
        state: counts the bytes.
        group: the ranks; None is the default group.

    Raises:
        InputError: if the arguments cannot be used.
    """
    flat, exchange = _opened(acc, k, state, group)
    k = min(k, len(flat))
    chosen = largest(flat, k)[0]
    places, values = chosen, flat[chosen]
    ranks, rank = exchange.ranks, exchange.rank
    wire = Wire("int32", "exact", acc.dtype)
    slot, empty = wire.encode(chosen.new_zeros(k), flat.new_zeros(k), 0, len(flat))
    dropped: list[tuple[Tensor, Tensor]] = []
    strides = [1 << level for level in range((ranks - 1).bit_length())]
    for stride in strides:
        if rank % (2 * stride) == stride:
            _move(exchange, "tree", _slot(wire, places, values, k, len(flat)), rank - stride)
            break
        if rank + stride < ranks:
            message = _move(exchange, "tree", None, None, torch.empty_like(empty), rank + stride)
            places, values, *rest = _merged(places, values, *wire.decode(slot, message, 0, len(flat)), k)
            dropped.append((rest[0], rest[1]))
    for stride in reversed(strides):
        if rank % (2 * stride) == stride:
            message = _move(exchange, "tree", None, None, torch.empty_like(empty), rank - stride)
            places, values = wire.decode(slot, message, 0, len(flat))
        elif rank % (2 * stride) == 0 and rank + stride < ranks:
            _move(exchange, "tree", _slot(wire, places, values, k, len(flat)), rank + stride)
    result = torch.zeros_like(flat)
    result[places] = values
    final = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    final[places] = True
    flat[chosen[final[chosen]]] = 0
    for at, lost in dropped:
        flat[at[final[at]]] += lost[final[at]]
    return result.view_as(acc)


def _opened(acc: Tensor, k: int, state: SparseAllreduceState | None, group: dist.ProcessGroup | None) -> tuple[Tensor, Exchange]:
    """Return the flat vector and the ranks, or refuse."""
    if refusal := why_not(acc, k, 1):
        raise InputError(refusal)
    return acc.view(-1), Exchange(group, acc.device, None if state is None else state.traffic)


def _gathered(flat: Tensor, chosen: Tensor, exchange: Exchange) -> Tensor:
    """Return the sum of what all ranks have chosen, added in the order of the ranks, and take it out of ``flat``."""
    wire = Wire("int32", "exact", flat.dtype)
    header, message = wire.encode(chosen, flat[chosen], 0, len(flat))
    flat[chosen] = 0
    headers = [of_rank for (of_rank,) in exchange.all_gather_integers([header], "counts")]
    lengths = [wire.message_bytes(of_rank, len(flat)) for of_rank in headers]
    result = torch.zeros_like(flat)
    for of_rank, part in zip(headers, _ring_allgather(message, lengths, exchange, "allgather"), strict=True):
        places, values = wire.decode(of_rank, part, 0, len(flat))
        result[places] += values
    return result


def _packed(places: Tensor, values: Tensor, span: int) -> tuple[int, Tensor]:
    """Return header and bytes of a piece: entries, or every element where that is shorter."""
    header, message = Wire("int32", "exact", values.dtype).encode(places, values, 0, span)
    if len(message) <= _packed_bytes(DENSE, span, values.dtype):
        return header, message
    dense = values.new_zeros(_packed_bytes(DENSE, span, values.dtype) // values.dtype.itemsize)
    dense[places] = values
    return DENSE, dense.view(torch.uint8)


def _packed_bytes(header: int, span: int, dtype: torch.dtype) -> int:
    if header == DENSE:
        return -(-span * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return Wire("int32", "exact", dtype).message_bytes(header, span)


def _unpack_onto(part: Tensor, header: int, message: Tensor) -> None:
    """Add a piece to the part of the vector that it belongs to."""
    if header == DENSE:
        part += message.view(part.dtype)[: len(part)]
    else:
        places, values = Wire("int32", "exact", part.dtype).decode(header, message, 0, len(part))
        part[places] += values


def _slot(wire: Wire, places: Tensor, values: Tensor, k: int, span: int) -> Tensor:
    """Return a message of exactly ``k`` entries; those that are missing have the value 0."""
    missing = k - len(places)
    return wire.encode(torch.cat([places, places.new_zeros(missing)]), torch.cat([values, values.new_zeros(missing)]), 0, span)[1]


def _merged(places: Tensor, values: Tensor, more: Tensor, of_more: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return positions and sums of the k largest of two sets together, then of those that are dropped."""
    union, slots = torch.unique(torch.cat([places, more]), return_inverse=True)
    sums = values.new_zeros(len(union))
    sums[slots[: len(places)]] = values
    sums[slots[len(places) :]] += of_more
    union, sums = union[sums != 0], sums[sums != 0]
    kept = torch.isin(union, trim(union, sums, k)[0])
    return union[kept], sums[kept], union[~kept], sums[~kept]


def _ring_allgather(message: Tensor, lengths: list[int], exchange: Exchange, phase: str) -> list[Tensor]:
    """Return the message of every rank, of any lengths: each is passed on around the ring, without padding."""
    ranks, rank = exchange.ranks, exchange.rank
    parts = [message.new_empty(length) for length in lengths]
    parts[rank] = message
    for turn in range(ranks - 1):
        source = (rank - turn - 1) % ranks
        right, left = (rank + 1) % ranks, (rank - 1) % ranks
        parts[source] = _move(exchange, phase, parts[(source + 1) % ranks], right, parts[source], left)
    return parts


def _move(
    exchange: Exchange,
    phase: str,
    sent: Tensor | None = None,
    to: int | None = None,
    received: Tensor | None = None,
    source: int | None = None,
) -> Tensor:
    """Send bytes to one rank and fill ``received`` from another, both at once; return the latter."""
    group, device = exchange.group, exchange.wire_device
    operations = []
    for call, tensor, peer in ((dist.isend, sent, to), (dist.irecv, received, source)):
        if tensor is not None and peer is not None and len(tensor):
            moved = tensor.to(device).contiguous()
            operations.append(dist.P2POp(call, moved, peer if group is None else dist.get_global_rank(group, peer), group))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    exchange.traffic.count(phase, 0 if sent is None else len(sent), 0 if received is None else len(received))
    if received is None:
        return torch.empty(0, dtype=torch.uint8)
    return operations[-1].tensor.to(exchange.device) if len(received) else received


ALGORITHMS: dict[str, Callable[..., Tensor]] = {
    "ok_topk": sparse_allreduce,
    "dense": dense_allreduce,
    "topk_a": topk_allgather,
    "topk_dsa": topk_dsa,
    "gtopk": gtopk_allreduce,
    "gaussian_k": gaussian_k_allgather,
}
