"""The ranks' side of ``ok_topk_shaped_link.py``: what reaches thresholds, and the seconds of each phase."""

import torch
from _ok_topk import Gradients
from _ok_topk_network import shape

from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from tests.ranks.hosts import Host

DENSITY = 0.01
POLICIES = ("servo", "reused", "sampled", "exact")
WIRES = {"exact values": ("auto", "exact"), "delta16, bfloat16": ("delta16", "bfloat16")}
LINKS_MBIT: dict[str, float | None] = {"no limit": None, "100 Mbit/s": 100.0}
WARM_UP, STEPS, EXACT_STEPS = 20, 20, 5


def selected(rank: int, ranks: int, policy: str, steps: int, elements: int = 1 << 20) -> list[tuple[int, float]]:
    """Return the share of k that reached this rank's threshold at each step, from empty residuals on."""
    gradients, acc = Gradients(elements, rank), torch.zeros(elements)
    state, k, points = SparseAllreduceState(threshold=policy), round(DENSITY * elements), []
    for step in range(1, steps + 1):
        acc += gradients.next()
        sparse_allreduce(acc, k, state=state)
        points.append((step, state.report.candidates / k))
    return points


def phases(rank: int, ranks: int, hosts: list[Host], elements: int = 1 << 22) -> dict[str, dict[str, float]]:
    """Return the mean seconds of each phase of a step, by kind of step and link."""
    gradients, k, taken = Gradients(elements, rank), round(DENSITY * elements), {}
    for wire, (indices, values) in WIRES.items():
        acc, state = torch.zeros(elements), SparseAllreduceState(indices=indices, values=values, threshold_every=10_000)
        for link, bandwidth_mbit in LINKS_MBIT.items():
            shape(rank, hosts, None)
            for _ in range(WARM_UP):
                acc += gradients.next()
                sparse_allreduce(acc, k, state=state)
            shape(rank, hosts, bandwidth_mbit)
            for exact, steps in ((False, STEPS), (True, EXACT_STEPS)):
                state.traffic.clear()
                for _ in range(steps):
                    acc += gradients.next()
                    state.step = 0 if exact else 1
                    sparse_allreduce(acc, k, state=state)
                name = f"{wire}, {link}{', exact threshold' if exact else ''}"
                taken[name] = {phase: seconds / steps for phase, seconds in state.traffic.seconds.items()}
    shape(rank, hosts, None)
    return taken
