"""What a step of sparse allreduce costs in the (alpha, beta, gamma) model, from counted messages and words; no network.

    time = sum over phases of  share * (max over ranks of (alpha * messages + beta * max(sent, received)) + work)
    work = max over ranks of (gamma * elements + topk * selected)

A scheme turns the index sets that the ranks really selected into phases (``simulated_schemes.py``), so that fill-in, skewed
regions and receive hot spots are counted, not assumed. Links are full duplex and do not disturb each other; phases do not
overlap; a rank's messages in a phase start one after the other. Everything derived from this module is a simulation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Counts = NDArray[np.float64]

WORD_BYTES = 4


@dataclass(frozen=True)
class Supports:
    """The index sets of one step.

    Attributes:
        length: entries of the flat gradient in which the indices lie.
        local: sorted indices that each rank selected.
        final: sorted indices of the global selection; all of them are somebody's.
        scale: entries of the real vector for which one of ``length`` stands. A sample of a long vector with the same density
            and profile costs its words times this factor; messages and histograms do not grow with it.
    """

    length: int
    local: tuple[Indices, ...]
    final: Indices
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.local:
            raise ValueError("supports need at least one rank, got none")
        for name, indices in [*((f"rank {rank}", indices) for rank, indices in enumerate(self.local)), ("final", self.final)]:
            if indices.size and (indices[0] < 0 or indices[-1] >= self.length or (np.diff(indices) <= 0).any()):
                raise ValueError(f"indices of {name} must be sorted, distinct and in [0, {self.length}), got {indices}")

    @property
    def ranks(self) -> int:
        """Return how many ranks there are."""
        return len(self.local)

    @property
    def sizes(self) -> Counts:
        """Return how many entries of the real vector each rank selected."""
        return self.scale * np.array([indices.size for indices in self.local], dtype=np.float64)

    @property
    def elements(self) -> float:
        """Return the length of the real vector."""
        return self.scale * self.length

    def first(self, ranks: int) -> "Supports":
        """Return what the first ranks selected; the final set becomes that part of it that is still somebody's."""
        kept = np.zeros(self.length, dtype=bool)
        for indices in self.local[:ranks]:
            kept[indices] = True
        return Supports(self.length, self.local[:ranks], self.final[kept[self.final]], self.scale)


@dataclass(frozen=True)
class Phase:
    """What every rank does between two points at which all have to wait for each other.

    Attributes:
        name: such as ``split_and_reduce``; phases of one name are added up in a breakdown.
        messages: ``(ranks,)``, started one after the other.
        sent_words: ``(ranks,)``, of four bytes.
        received_words: ``(ranks,)``.
        elements: ``(ranks,)``, elements read or written by streaming passes.
        selected: ``(ranks,)``, elements among which an exact top-k is taken.
        share: of all steps, in which the phase happens; 1/32 for what is done every 32nd step.
        inside: whether the words stay inside a node.
    """

    name: str
    messages: Counts
    sent_words: Counts
    received_words: Counts
    elements: Counts
    selected: Counts
    share: float = 1.0
    inside: bool = False


class Link(NamedTuple):
    """Seconds to start a message, and seconds that a word of four bytes takes."""

    alpha_s: float
    beta_s_per_word: float


@dataclass(frozen=True)
class Machine:
    """What messages, words and local work cost.

    Attributes:
        between: the link of a node to the others.
        gamma_s_per_element: for each element that a streaming pass reads or writes.
        topk_s_per_element: for each element among which an exact top-k is taken.
        inside: the link inside a node; that between nodes if there is none.
    """

    between: Link
    gamma_s_per_element: float = 0.0
    topk_s_per_element: float = 0.0
    inside: Link | None = None

    def __post_init__(self) -> None:
        costs = [*self.between, self.gamma_s_per_element, self.topk_s_per_element, *(self.inside or ())]
        if any(cost < 0 for cost in costs):
            raise ValueError(f"costs must be 0 or more seconds, got {self}")


def make_phase(
    name: str,
    ranks: int,
    messages: Counts | float = 0.0,
    sent_words: Counts | float = 0.0,
    received_words: Counts | float | None = None,
    elements: Counts | float = 0.0,
    selected: Counts | float = 0.0,
    share: float = 1.0,
    inside: bool = False,
) -> Phase:
    """Make a phase; a number stands for the same on every rank, and what is received is what is sent unless it is given."""
    received = sent_words if received_words is None else received_words
    given = (messages, sent_words, received, elements, selected)
    started, sent, arrived, streamed, sorted_out = (np.broadcast_to(np.asarray(x, np.float64), ranks) for x in given)
    return Phase(name, started, sent, arrived, streamed, sorted_out, share, inside)


def phase_time_s(phase: Phase, machine: Machine) -> float:
    """Return the seconds of a phase in the average step, so with its share."""
    link = machine.inside if phase.inside and machine.inside is not None else machine.between
    words = np.maximum(phase.sent_words, phase.received_words)
    transfer_s = (link.alpha_s * phase.messages + link.beta_s_per_word * words).max()
    work_s = (machine.gamma_s_per_element * phase.elements + machine.topk_s_per_element * phase.selected).max()
    return phase.share * float(transfer_s + work_s)


def step_time_s(phases: Sequence[Phase], machine: Machine) -> float:
    """Return the seconds of the average step."""
    return sum(phase_time_s(phase, machine) for phase in phases)


def breakdown_s(phases: Sequence[Phase], machine: Machine) -> dict[str, float]:
    """Return the seconds of the average step by the name of the phase."""
    seconds: dict[str, float] = {}
    for phase in phases:
        seconds[phase.name] = seconds.get(phase.name, 0.0) + phase_time_s(phase, machine)
    return seconds


def critical_words(phases: Sequence[Phase], inside: bool = False) -> float:
    """Return the factor of beta: the words of the busiest rank of each phase, added up over the phases with their shares.

    Args:
        phases: of a step.
        inside: count what stays inside nodes, instead of what passes between them.
    """
    return sum(
        phase.share * float(np.maximum(phase.sent_words, phase.received_words).max())
        for phase in phases
        if phase.inside == inside
    )


def critical_messages(phases: Sequence[Phase], inside: bool = False) -> float:
    """Return the factor of alpha, counted as ``critical_words`` counts words."""
    return sum(phase.share * float(phase.messages.max()) for phase in phases if phase.inside == inside)


class Calibration(NamedTuple):
    """A link fitted to measured all-reduces, and how well it predicts those of a world size that it has not seen.

    Attributes:
        link: fitted to the other world sizes.
        held_out: the world size that was left out.
        predicted_s: seconds for the rows of that world size.
        measured_s: the same, measured.
    """

    link: Link
    held_out: int
    predicted_s: Counts
    measured_s: Counts

    @property
    def errors(self) -> Counts:
        """Return predicted over measured, less 1."""
        return self.predicted_s / self.measured_s - 1


def ring_counts(world_size: NDArray[np.integer], sizes_bytes: NDArray[np.integer]) -> Counts:
    """Return messages and words of dense ring all-reduces, ``(rows, 2)``."""
    ranks = np.asarray(world_size, np.float64)
    words = np.asarray(sizes_bytes, np.float64) / WORD_BYTES
    return np.stack([2 * (ranks - 1), 2 * words * (ranks - 1) / ranks], axis=1)


def calibrate(
    world_size: NDArray[np.integer], sizes_bytes: NDArray[np.integer], seconds: Counts, held_out: int | None = None
) -> Calibration:
    """Fit alpha and beta to measured dense ring all-reduces by least squares of the relative errors.

    Relative, because in plain squares the few largest buffers would leave alpha undetermined. A cost that comes out negative is
    set to 0 and the other fitted alone.

    Args:
        world_size: ``(rows,)``, ranks that took part.
        sizes_bytes: ``(rows,)``, bytes of each rank's buffer.
        seconds: ``(rows,)``, measured.
        held_out: the world size to predict instead of using it; the largest if not given.

    Raises:
        ValueError: if fewer than two rows are left to fit, none to predict, or a time is not positive.
    """
    held_out = int(np.max(world_size)) if held_out is None else held_out
    rest = np.asarray(world_size) != held_out
    if rest.sum() < 2 or rest.all():
        sizes = sorted({*world_size.tolist()})
        raise ValueError(f"need rows of world size {held_out} to predict and two others to fit, got world sizes {sizes}")
    if not (seconds > 0).all():
        raise ValueError(f"seconds must be positive, got {seconds.min()}")
    counts = ring_counts(world_size, sizes_bytes)
    relative = counts[rest] / seconds[rest, None]
    costs = np.linalg.lstsq(relative, np.ones(len(relative)), rcond=None)[0]
    if (costs < 0).any():
        other = 1 - int(np.argmin(costs))
        costs = np.zeros(2)
        costs[other] = relative[:, other].sum() / np.square(relative[:, other]).sum()
    return Calibration(Link(*costs.tolist()), held_out, counts[~rest] @ costs, seconds[~rest])
