"""One step of a sparse allreduce: over the whole vector at once, or segment by segment as they become known.

What a part of the vector sends is decided by thresholds that are known beforehand, for the whole vector, and by what earlier
parts have left of the budget of k entries. Where thresholds are due, all of it has to be there; otherwise each part can be
sent by itself, and the selection is the same. Nothing is changed before `commit`: a later segment may turn out not to be finite,
and the step is then left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce.agreement import FINE, NOT_FINITE, agree, checksum
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.global_threshold import GlobalChoice, choose, reached
from lightning_plugins.engines.sparse_allreduce.reduction import Parcel, Routing, balance_and_allgather, packed, split_and_reduce
from lightning_plugins.engines.sparse_allreduce.selection import count_reaching, largest, sampled_threshold, select, trim
from lightning_plugins.engines.sparse_allreduce.state import Report, SparseAllreduceState
from lightning_plugins.engines.sparse_allreduce.threshold import PROBE
from lightning_plugins.engines.sparse_allreduce.wire import Wire


@dataclass(frozen=True)
class Segment:
    """A part of the vector with regions of its own: positions from ``start`` up to ``end``."""

    start: int
    end: int
    routing: Routing


@dataclass(frozen=True)
class _Sent:
    """What a segment's exchange leaves to be done: positions in the vector, and values.

    Attributes:
        chosen: what this rank selected.
        kept_back: what the wire's rounding left of each.
        owned: this rank's reduced entries in the final set.
        owner_kept_back: what rounding left of each.
        places: the final set, the same on all ranks.
        values: of the final set.
    """

    chosen: Tensor
    kept_back: Tensor
    owned: Tensor
    owner_kept_back: Tensor
    places: Tensor
    values: Tensor


class SparseStep:
    """A step under way.

    Args:
        state: thresholds and counters; they move at `commit`.
        acc: ``(n,)``, residual plus gradient.
        k: entries that a rank sends at most, and that the result has at most.
        exchange: the ranks.
    """

    def __init__(self, state: SparseAllreduceState, acc: Tensor, k: int, exchange: Exchange) -> None:
        self.state = state
        self.acc = acc
        self.k = k
        self.exchange = exchange
        self.exact = state.due
        self.report = Report(exact=self.exact)
        self._wire = Wire(state.settings.indices, state.settings.values, acc.dtype)
        cuts = checksum([asdict(routing) for routing in state.routings])
        settings = {**asdict(state.settings), "dtype": str(acc.dtype), "cuts (checksum)": cuts}
        self._alike = {"elements": len(acc), "k": k, "step": state.step, "settings": settings}
        self._sent: list[_Sent] = []
        self._thresholds = (state.local.value, state.overall.value)

    def reduce(
        self,
        segments: Sequence[Segment],
        finite: bool,
        unused: Sequence[tuple[int, int]] = (),
        parts: Sequence[tuple[int, int]] = (),
    ) -> tuple[Tensor, Tensor]:
        """Exchange neighbouring segments and return positions and sums of their final set.

        Args:
            segments: in order; all of them where thresholds are due.
            finite: whether this rank's gradient is.
            unused: parts of the vector, ``(start, end)``, of which nothing may be selected.
            parts: of these segments, ``(start, end)`` in the order in which they use the budget up; the segments themselves if
                left out.

        Raises:
            InputError: on all ranks, if they differ in what must be alike.
        """
        settings, traffic = self.state.settings, self.exchange.traffic
        with traffic.timing("select"):
            parts = parts or [(segment.start, segment.end) for segment in segments]
            chosen = self._select(parts, unused) if finite else torch.empty(0, dtype=torch.int64, device=self.acc.device)
            values = self._wire.rounded(self.acc[chosen])
            ends = torch.tensor([segment.end for segment in segments[:-1]], dtype=torch.int64, device=chosen.device)
            cut = torch.searchsorted(chosen, ends).tolist()
            chosen_of, values_of = chosen.tensor_split(cut), values.tensor_split(cut)
        with traffic.timing("agreement"):
            condition, most = agree(FINE if finite else NOT_FINITE, [*map(len, chosen_of)], self._alike, self.exchange)
        if condition == NOT_FINITE or self.report.skipped:
            self.report.skipped = True
            return chosen[:0], values[:0]
        self.report.most_selected += sum(most)
        owned, sums = [], []
        for segment, places, of_segment, of_busiest in zip(segments, chosen_of, values_of, most, strict=True):
            summed = split_and_reduce(
                places - segment.start,
                of_segment,
                segment.end - segment.start,
                of_busiest,
                segment.routing,
                settings,
                self._wire,
                self.exchange,
            )
            owned.append(summed.indices + segment.start)
            sums.append(summed.sums)
            self.report.most_received += summed.most_received
        return self._finish(segments[0].routing.owners, parts, chosen, values, torch.cat(owned), torch.cat(sums))

    def commit(self) -> None:
        """Take what was sent out of ``acc``, which is the residual then, and move the thresholds; skipped, change nothing."""
        state, settings, report = self.state, self.state.settings, self.report
        state.report = report
        if report.skipped:
            return
        with self.exchange.traffic.timing("clear"):
            final = torch.zeros(len(self.acc), dtype=torch.bool, device=self.acc.device)
            for sent in self._sent:
                final[sent.places] = True
            for sent in self._sent:
                hit = final[sent.chosen]
                # Only what was sent and is in the final set has left; rounding errors stay, at the sender and at the owner.
                self.acc[sent.chosen[hit]] = sent.kept_back[hit]
                self.acc[sent.owned] += sent.owner_kept_back
        state.local.value, state.overall.value = self._thresholds
        if settings.threshold != "reused":
            state.local.follow(report.candidates, report.beyond, self.k)
            state.overall.follow(report.candidates_globally, report.beyond_globally, self.k)
        if state.overall.value == 0.0 and report.candidates_globally > self.k:
            # Found where fewer than k sums were not zero, such as with a head that starts at zero; no factor leads away from it.
            state.overall.value = None
        state.step += 1

    def _select(self, parts: Sequence[tuple[int, int]], unused: Sequence[tuple[int, int]]) -> Tensor:
        """Return the positions that this rank sends of these parts."""
        acc = self.acc
        if unused:
            acc = acc.clone()
            for start, end in unused:
                acc[start:end] = 0
        local, overall = self._thresholds
        if self.state.settings.threshold == "sampled":
            local = sampled_threshold(acc, self.k, self.state.step)
        elif self.exact:
            first = parts[0][0]
            chosen, local = largest(acc[first : parts[-1][1]], self.k)
            self._thresholds = (local, overall)
            self.report.candidates = self.report.selected = len(chosen)
            self.report.beyond = count_reaching(acc[chosen + first], PROBE * local)
            return chosen + first
        assert local is not None
        self._thresholds = (local, overall)
        found = []
        for start, end in parts:
            chosen = select(acc[start:end], local)
            values = acc[start:end][chosen]
            self.report.candidates += len(chosen)
            self.report.beyond += count_reaching(values, PROBE * local)
            if len(chosen) > (left := self.k - self.report.selected):
                chosen = trim(chosen, values, left)[0]
            self.report.selected += len(chosen)
            found.append(chosen + start)
        return torch.cat(found)

    def _finish(
        self,
        order: list[int],
        parts: Sequence[tuple[int, int]],
        chosen: Tensor,
        values: Tensor,
        owned: Tensor,
        sums: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Choose the final set among the reduced entries, spread it, and keep what is left to be done."""
        local, _ = self._thresholds
        parcel: Parcel | None = None

        def label(kept: Tensor) -> list[int]:  # nearly always what reaches the threshold is what is sent
            nonlocal parcel
            parcel = packed(owned[kept], self._wire.rounded(sums[kept]), self._wire)
            return parcel.label

        with self.exchange.traffic.timing("threshold"):
            choice = self._choose(order, parts, owned, sums, label)
        if self.exact:
            self._thresholds = (local, choice.threshold)
        owned, sums = owned[choice.kept], sums[choice.kept]
        rounded = self._wire.rounded(sums)
        wire, exchange = self._wire, self.exchange
        places, final = balance_and_allgather(owned, rounded, choice.counts, order, wire, exchange, parcel, choice.labels)
        if not bool(final.isfinite().all()):  # sums of finite values have overflowed; every rank sees the same
            self.report.skipped = True
            return places[:0], final[:0]
        self.report.selected_globally += sum(choice.counts)
        self.report.candidates_globally += choice.candidates
        self.report.beyond_globally += choice.beyond
        self._sent.append(_Sent(chosen, self.acc[chosen] - values, owned, sums - rounded, places, final))
        return places, final

    def _choose(
        self,
        order: list[int],
        parts: Sequence[tuple[int, int]],
        owned: Tensor,
        sums: Tensor,
        label: Callable[[Tensor], list[int]],
    ) -> GlobalChoice:
        """Return this rank's entries in the final set; what is left of the budget goes to the parts in their order."""
        left, most = self.k - self.report.selected_globally, self.k * self.exchange.ranks
        if self.exact:
            return choose(sums, None, left, order, self.exchange, most=most)
        threshold = self._thresholds[1]
        assert threshold is not None
        choice = reached(sums, threshold, self.exchange, label)
        if choice.candidates <= left:
            return choice
        ends = torch.tensor([end for _, end in parts[:-1]], dtype=torch.int64, device=owned.device)
        kept, counts = [], [0] * self.exchange.ranks
        for of_part in sums.tensor_split(torch.searchsorted(owned, ends).tolist()):
            chosen = choose(of_part, threshold, left, order, self.exchange, most=most)
            kept.append(chosen.kept)
            counts = [before + more for before, more in zip(counts, chosen.counts, strict=True)]
            left -= sum(chosen.counts)
        return GlobalChoice(torch.cat(kept), counts, threshold, choice.candidates, choice.beyond)
