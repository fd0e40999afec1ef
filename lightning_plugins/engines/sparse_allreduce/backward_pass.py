"""One backward pass of DDP: buckets arrive, segments go out as soon as they may, and at the end everybody gets the mean."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce.measuring import measure
from lightning_plugins.engines.sparse_allreduce.selection import accumulate
from lightning_plugins.engines.sparse_allreduce.state import Report
from lightning_plugins.engines.sparse_allreduce.step import Segment, SparseStep

if TYPE_CHECKING:
    from lightning_plugins.engines.sparse_allreduce.hook import OkTopkState


@dataclass(frozen=True)
class Arrived:
    """A bucket: its gradients, and whom to tell when they are reduced.

    Attributes:
        index: among the buckets of the pass, from 0.
        names: of the parameters, in the buffer's order.
        buffer: their gradients end to end; the mean is written here.
        last: whether no other follows.
        future: gets the buffer.
        used: parameters that got a gradient on this rank, where backward passes may leave some out.
    """

    index: int
    names: list[str]
    buffer: Tensor
    last: bool
    future: torch.futures.Future[Tensor]
    used: frozenset[str] = frozenset()


class BackwardPass:
    """The buckets of one pass, in a worker's thread.

    Args:
        state: of the hook; residual, thresholds and counters change when the last bucket is through.
    """

    def __init__(self, state: "OkTopkState") -> None:
        self.state = state
        self.arrived: list[Arrived] = []
        self.dense = state.dense
        self._scale = state.loss_scale()
        self._finite = True
        self._unused: list[tuple[int, int]] = []
        self._earlier: list[tuple[Tensor, Tensor]] = []  # parts of the buckets that are not of this pass, and what they held
        self._complete: set[str] = set()  # parameters whose gradients are in `acc`
        self._sent = 0  # segments that are through
        self._final: list[tuple[Tensor, Tensor]] = []  # positions in the vector and sums
        self._dense_s = 0.0
        self._steps: list[SparseStep] = []
        if not self.dense and state.options.mode != "per_bucket":
            self._steps = [SparseStep(state.cores[0], state.acc, state.k, state.exchange)]

    def arrive(self, bucket: Arrived) -> None:
        """Take a bucket, and do all that can be done by now."""
        self.arrived.append(bucket)
        if self.state.options.unused_parameters:
            self._leave_out_unused(bucket)
        take = self._reduce_densely if self.dense else self._accumulate
        if self.state.options.clip_norm is None:
            take(bucket)
        elif bucket.last:
            self._clip(self.state.options.clip_norm)
            for waiting in self.arrived:
                take(waiting)
        if not self.dense and (self.state.options.mode != "global" or bucket.last):
            self._send_ready()
        if bucket.last:
            self._finish()
            for part, earlier in self._earlier:
                part.copy_(earlier)
            # Last of all: whoever waits may ask for the state at once.
            for waiting in self.arrived:
                waiting.future.set_result(waiting.buffer)

    def _accumulate(self, bucket: Arrived) -> None:
        """Add a bucket to its residuals."""
        state = self.state
        with state.traffic.timing("inside_node"):
            gradient = state.nodes.scatter(bucket.buffer, self._whole_sizes(bucket))
        with state.traffic.timing("accumulate"):
            for start, place, length in state.layout.runs(bucket.names):
                part = slice(place, place + length)
                finite = accumulate(state.residual[part], gradient[start : start + length], state.acc[part], 1.0 / self._scale)
                self._finite = self._finite and finite
        self._complete.update(bucket.names)

    def _leave_out_unused(self, bucket: Arrived) -> None:
        """Keep what waits for parameters without a gradient on any rank: DDP throws away what the hook says of them.

        Their part of the bucket may hold what an earlier pass has left in ``.grad``, or be ``.grad`` itself
        (``gradient_as_bucket_view``), so that it is put back afterwards.
        """
        layout = self.state.layout
        used = self.state.everyone.largest_integers([int(name in bucket.used) for name in bucket.names], "agreement")
        parts = bucket.buffer.split(self._whole_sizes(bucket))
        for name, part, by_any in zip(bucket.names, parts, used, strict=True):
            if not by_any:
                self._earlier.append((part, part.clone()))
                part.zero_()
                self._unused.append((layout.starts[name], layout.starts[name] + layout.sizes[name]))

    def _send_ready(self) -> None:
        """Exchange the segments that are complete, in order; where thresholds are due only all together."""
        segments = self.state.layout.segments
        if self.state.options.mode == "global":
            whole = Segment(0, self.state.layout.elements, self.state.cores[0].routings[0])
            parts = [self.state.layout.bounds(number) for number in range(len(segments))]
            self._final.append(self._steps[0].reduce([whole], self._finite, self._unused, parts))
            return
        ready = self._sent
        while ready < len(segments) and self._complete.issuperset(segments[ready]):
            ready += 1
        if self.state.options.mode == "per_bucket":
            for number in range(self._sent, ready):
                self._send_by_itself(number)
        elif self._steps[0].exact:
            if ready < len(segments):
                return
            self._reduce(self._steps[0], list(range(ready)))
        else:
            for number in range(self._sent, ready):
                self._reduce(self._steps[0], [number])
        self._sent = ready

    def _reduce(self, step: SparseStep, numbers: list[int]) -> None:
        routings = self.state.cores[0].routings
        segments = [Segment(*self.state.layout.bounds(number), routings[number]) for number in numbers]
        self._final.append(step.reduce(segments, self._finite, self._unused))

    def _send_by_itself(self, number: int) -> None:
        state, core = self.state, self.state.cores[number]
        start, end = state.layout.bounds(number)
        k = state.options.elements_sent_of(end - start, state.exchange.ranks)
        step = SparseStep(core, state.acc[start:end], k, state.exchange)
        self._steps.append(step)
        unused = [(first - start, last - start) for first, last in self._unused if start <= first < end]
        places, values = step.reduce([Segment(0, end - start, core.routings[0])], self._finite, unused)
        self._final.append((places + start, values))

    def _finish(self) -> None:
        """Clear what was sent, or nothing if the step is left out, and fill the buckets with the mean."""
        state = self.state
        state.passes += 1
        if self.dense:
            self._finish_densely()
            return
        state.skipped = any(step.report.skipped for step in self._steps)
        if state.nodes.inside > 1:  # so far, only ranks with the same chunks know of each other
            state.skipped = state.everyone.largest_integers([int(state.skipped)], "agreement")[0] == 1
        for step in self._steps:
            step.report.skipped = state.skipped
        if state.skipped:
            state.skipped_count += 1
        measured = {} if state.skipped else measure(state, self._final)
        for step in self._steps:
            step.commit()
        if not state.skipped:
            state.residual, state.acc = state.acc, state.residual
            state.steps += 1
            if state.advice is not None:
                state.advice.note(state, dense=False, exact=self._steps[0].exact)
        state.metrics = {**_counted([step.report for step in self._steps], state), **measured, **_advised(state)}
        with state.traffic.timing("unpack"):
            self._fill_buckets()
        composition = [bucket.names for bucket in self.arrived]
        # The first pass of a process has other buckets than all that follow.
        if state.passes > 1 and composition != state.layout.segments:
            state.rearrange(composition)

    def _fill_buckets(self) -> None:
        state = self.state
        if state.skipped:
            for bucket in self.arrived:
                bucket.buffer.fill_(math.nan)
            return
        places = torch.cat([of_segment for of_segment, _ in self._final])
        values = torch.cat([of_segment for _, of_segment in self._final])
        sequence = places.argsort()
        places, values = places[sequence], values[sequence] / state.nodes.ranks * self._scale
        for bucket in self.arrived:
            inside = state.nodes.inside > 1
            sizes = [state.layout.sizes[name] for name in bucket.names]
            mean = torch.zeros(sum(sizes), dtype=bucket.buffer.dtype, device=places.device) if inside else bucket.buffer.zero_()
            for start, place, length in state.layout.runs(bucket.names):
                ends = torch.tensor([place, place + length], device=places.device)
                first, last = torch.searchsorted(places, ends).tolist()
                mean[places[first:last] - (place - start)] = values[first:last].to(mean.dtype)
            if inside:
                state.nodes.gather(mean, self._whole_sizes(bucket), bucket.buffer)

    def _reduce_densely(self, bucket: Arrived) -> None:
        """Reduce a bucket as DDP does, and with it what waits in its residuals."""
        state = self.state
        started_s = time.perf_counter()
        gradient = state.nodes.scatter(bucket.buffer, self._whole_sizes(bucket))
        for start, place, length in state.layout.runs(bucket.names):
            part = slice(place, place + length)
            torch.add(gradient[start : start + length], state.residual[part], alpha=self._scale, out=state.acc[part])
            gradient[start : start + length] = state.acc[part]
        mean = state.exchange.add(gradient.div_(state.nodes.ranks), "dense")
        state.nodes.gather(mean, self._whole_sizes(bucket), bucket.buffer)
        # What all have gathered is the same on all ranks, and so is what follows from it.
        self._finite = self._finite and (math.isfinite(float(bucket.buffer.sum())) or bool(bucket.buffer.isfinite().all()))
        self._dense_s += time.perf_counter() - started_s

    def _finish_densely(self) -> None:
        state = self.state
        state.skipped = not self._finite
        state.metrics = {"skipped_count": float(state.skipped_count + state.skipped), **_advised(state)}
        if state.skipped:
            state.skipped_count += 1
            self._fill_buckets()
            return
        kept = [(start, end, state.residual[start:end].clone()) for start, end in self._unused]
        state.residual.zero_()
        for start, end, waiting in kept:
            state.residual[start:end] = waiting
        state.steps += 1
        if state.advice is not None:
            state.advice.note(state, dense=True, reduction_s=self._dense_s)

    def _clip(self, clip_norm: float) -> None:
        """Bring this rank's gradient to its share of the norm; one that is not finite stays as it is, and is seen later."""
        norm = math.sqrt(sum(float(bucket.buffer.double().square().sum()) for bucket in self.arrived)) / self._scale
        limit = clip_norm / math.sqrt(self.state.nodes.ranks)
        if math.isfinite(norm) and norm > limit:
            for bucket in self.arrived:
                bucket.buffer.mul_(limit / norm)

    def _whole_sizes(self, bucket: Arrived) -> list[int]:
        return [math.prod(self.state.shapes[name]) for name in bucket.names]


def _counted(reports: list[Report], state: "OkTopkState") -> dict[str, float]:
    """Return what a step selected, over all its segments."""
    ranks = state.exchange.ranks
    even = sum(report.most_selected for report in reports) * (ranks - 1) / ranks
    return {
        "selected_over_k": sum(report.selected for report in reports) / state.k,
        "reached_over_k": sum(report.candidates for report in reports) / state.k,
        "selected_globally_over_k": sum(report.selected_globally for report in reports) / state.k,
        "load_imbalance": sum(report.most_received for report in reports) / even if even else 1.0,
        "skipped_count": float(state.skipped_count),
    }


def _advised(state: "OkTopkState") -> dict[str, float]:
    gain = 0.0 if state.advice is None else state.advice.gain
    return {"predicted_gain": gain} if gain else {}
