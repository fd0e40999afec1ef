"""The two phases of Ok-Topk between the selection and the result: split-and-reduce, balance-and-allgather.

Split-and-reduce: the vector is cut into one region for each rank; everyone sends its entries of a region to the owner, who adds
them in the order of their sources. Balance-and-allgather: the owners' entries that are in the final set are dealt out in equal
slices, and every rank gets all slices. Sent and received, in entries of two words: at most k and k, then 2 k (P - 1) / P, so
6 k words in all. Paper: Li and Hoefler, PPoPP 2022, arXiv 2201.07598, sections 3.1 and 3.2.

Departures: cuts at the quantiles of the summed histogram, made anew whenever an owner would receive more than any rank
selects, since the paper's bound holds for what is sent alone; owners by what they hold; slices are dealt out whenever the fullest
rank has an eighth more than the mean, where the paper waits for four times the mean.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce.cuts import average_cuts, histogram_cuts
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.owners import MOST_RANKS, assign_owners
from lightning_plugins.engines.sparse_allreduce.settings import Settings
from lightning_plugins.engines.sparse_allreduce.wire import Wire

FEW_RANKS = 16  # up to which everyone is told everyone's counts, in one collective instead of two
UNEVEN = 1.125  # times the mean: what the fullest rank may have without dealing out


@dataclass
class Routing:
    """Who reduces what of a vector.

    Attributes:
        cuts: ``ranks + 1`` positions, or empty before the first partition.
        owners: rank of each region.
        age: steps since the cuts were made.
        granularity: entries by which a region may exceed its share.
        load: of the busiest owner when the cuts were made, fillers of the wire among it: where they were as good as can be.
        partitions: how often cuts were made.
    """

    cuts: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    age: int = 0
    granularity: int = 0
    load: int = 0
    partitions: int = 0

    def renew(self, indices: Tensor, size: int, k: int, settings: Settings, exchange: Exchange) -> None:
        """Cut anew for the supports of this step, and assign the regions."""
        if settings.cuts == "histogram":
            self.cuts, self.granularity = histogram_cuts(indices, size, k, exchange)
        else:
            self.cuts = average_cuts(indices, size, exchange)
        self.owners = list(range(exchange.ranks))
        if settings.owners == "local" and 1 < exchange.ranks <= MOST_RANKS:
            counts = exchange.all_gather_integers(self.split(indices), "cuts")
            self.owners = assign_owners(np.array(counts, dtype=np.int64))
        self.age = 0
        self.partitions += 1

    def split(self, indices: Tensor) -> list[int]:
        """Return how many of sorted ``indices`` lie in each region."""
        edges = torch.tensor(self.cuts, dtype=torch.int64, device=indices.device)
        return torch.diff(torch.searchsorted(indices, edges)).tolist()

    def region_of(self, rank: int) -> int:
        """Return the region that a rank owns."""
        return self.owners.index(rank)


@dataclass
class Summed:
    """What a rank has reduced: its region's entries, before the final choice.

    Attributes:
        indices: ``(c,)`` sorted.
        sums: ``(c,)``; some may have cancelled to 0.
        most_received: entries that the busiest owner got from others.
    """

    indices: Tensor
    sums: Tensor
    most_received: int


def split_and_reduce(
    indices: Tensor, values: Tensor, size: int, most: int, routing: Routing, settings: Settings, wire: Wire, exchange: Exchange
) -> Summed:
    """Send every selected entry to its owner, and add up what arrives, source 0 first.

    Args:
        indices: ``(c,)`` sorted, this rank's support.
        values: ``(c,)``, as the wire rounds them.
        size: length of the vector.
        most: entries that the rank with most has selected.
        routing: cuts and owners, made or renewed here when it is time.
        settings: the same on all ranks.
        wire: code of the messages.
        exchange: the ranks.
    """
    traffic = exchange.traffic
    with traffic.timing("cuts"):
        fresh = not routing.cuts or routing.age >= settings.repartition_every
        if fresh:
            routing.renew(indices, size, most, settings, exchange)
    messages, incoming, most_received = _prepare(indices, values, routing, wire, exchange)
    if most_received > max(most + routing.granularity, routing.load) and not fresh and settings.cuts == "histogram":
        fresh = True
        with traffic.timing("cuts"):
            routing.renew(indices, size, most, settings, exchange)
        messages, incoming, most_received = _prepare(indices, values, routing, wire, exchange)
    if fresh:
        routing.load = most_received
    routing.age += 1
    region = routing.region_of(exchange.rank)
    start, span = routing.cuts[region], routing.cuts[region + 1] - routing.cuts[region]
    with traffic.timing("split_and_reduce"):
        lengths = [wire.message_bytes(header, span) for header in incoming]
        parts = exchange.all_to_all_bytes(messages, lengths, "split_and_reduce")
        decoded = [wire.decode(header, part, start, span) for header, part in zip(incoming, parts, strict=True)]
        places, among = torch.unique(torch.cat([of_source for of_source, _ in decoded]), return_inverse=True)
        sums = torch.zeros(len(places), dtype=values.dtype, device=values.device)
        for of_source, (_, arrived) in zip(among.split([len(arrived) for _, arrived in decoded]), decoded, strict=True):
            sums[of_source] += arrived  # no place twice in one message: the order of the sources is the order of the sum
    return Summed(places, sums, most_received)


def _prepare(
    indices: Tensor, values: Tensor, routing: Routing, wire: Wire, exchange: Exchange
) -> tuple[list[Tensor], list[int], int]:
    """Return this rank's messages by destination, the headers of those that arrive, and the largest load of an owner."""
    with exchange.traffic.timing("pack"):
        counts = routing.split(indices)
        headers, messages = [0] * exchange.ranks, [torch.empty(0, dtype=torch.uint8)] * exchange.ranks
        parts = zip(indices.split(counts), values.split(counts), routing.cuts[:-1], routing.cuts[1:], strict=True)
        for owner, (places, of_region, start, end) in zip(routing.owners, parts, strict=True):
            headers[owner], messages[owner] = wire.encode(places, of_region, start, end - start)
    with exchange.traffic.timing("counts"):
        if exchange.ranks <= FEW_RANKS:
            everyone = exchange.all_gather_integers(headers, "counts")
            incoming = [of_source[exchange.rank] for of_source in everyone]
            loads = [
                sum(wire.entries(of_source[owner]) for rank, of_source in enumerate(everyone) if rank != owner)
                for owner in range(exchange.ranks)
            ]
            return messages, incoming, max(loads)
        incoming = [header for (header,) in exchange.all_to_all_integers([[header] for header in headers], "counts")]
        load = sum(wire.entries(header) for rank, header in enumerate(incoming) if rank != exchange.rank)
        return messages, incoming, exchange.largest_integers([load], "counts")[0]


@dataclass(frozen=True)
class Parcel:
    """A rank's entries as they are sent to all.

    Attributes:
        label: header, start and span, by which they are read.
        message: ``uint8``.
    """

    label: list[int]
    message: Tensor


def packed(indices: Tensor, values: Tensor, wire: Wire) -> Parcel:
    """Return entries, sorted by ``indices`` and rounded, as a parcel."""
    start = int(indices[0]) if len(indices) else 0
    span = int(indices[-1]) + 1 - start if len(indices) else 0
    header, message = wire.encode(indices, values, start, span)
    return Parcel([header, start, span], message)


def balance_and_allgather(
    indices: Tensor,
    values: Tensor,
    counts: list[int],
    order: list[int],
    wire: Wire,
    exchange: Exchange,
    parcel: Parcel | None = None,
    labels: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the entries of all ranks, the same on each.

    Args:
        indices: ``(c,)`` sorted, this rank's part of the final set.
        values: ``(c,)``, as the wire rounds them.
        counts: entries of each rank.
        order: ranks by the region that they own: where the entries lie evenly, slices stay where they are.
        wire: code of the messages.
        exchange: the ranks.
        parcel: these entries, where they are packed already.
        labels: of all ranks' parcels, where they are known already.
    """
    traffic = exchange.traffic
    with traffic.timing("balance"):
        if max(counts) * exchange.ranks > UNEVEN * sum(counts):
            indices, values = _dealt_out(indices, values, counts, order, wire, exchange)
            parcel = labels = None
    with traffic.timing("allgather"):
        if parcel is None or labels is None:
            parcel = packed(indices, values, wire)
            labels = exchange.all_gather_integers(parcel.label, "counts")
        lengths = [wire.message_bytes(header, span) for header, _, span in labels]
        parts = exchange.all_gather_bytes(parcel.message, lengths, "allgather")
        decoded = [wire.decode(header, part, start, span) for (header, start, span), part in zip(labels, parts, strict=True)]
        return torch.cat([places for places, _ in decoded]), torch.cat([of_rank for _, of_rank in decoded])


def _dealt_out(
    indices: Tensor, values: Tensor, counts: list[int], order: list[int], wire: Wire, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """Return this rank's slice of the entries, laid end to end in the given order and cut into slices of equal length."""
    total, ranks = sum(counts), exchange.ranks
    place = order.index(exchange.rank)
    first = sum(counts[rank] for rank in order[:place])
    ends = [total * slot // ranks for slot in range(ranks + 1)]
    sizes = [max(0, min(end, first + len(indices)) - max(start, first)) for start, end in pairwise(ends)]
    rows, messages = [[0, 0, 0]] * ranks, [torch.empty(0, dtype=torch.uint8)] * ranks
    for owner, places, of_slot in zip(order, indices.split(sizes), values.split(sizes), strict=True):
        if len(places):
            parcel = packed(places, of_slot, wire)
            rows[owner], messages[owner] = parcel.label, parcel.message
    incoming = exchange.all_to_all_integers(rows, "counts")
    lengths = [wire.message_bytes(header, span) for header, _, span in incoming]
    parts = exchange.all_to_all_bytes(messages, lengths, "balance")
    decoded = [wire.decode(row[0], part, row[1], row[2]) for row, part in zip(incoming, parts, strict=True)]
    places, arrived = torch.cat([part for part, _ in decoded]), torch.cat([part for _, part in decoded])
    sequence = places.argsort()
    return places[sequence], arrived[sequence]
