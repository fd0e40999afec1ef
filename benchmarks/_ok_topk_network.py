"""The ranks' side of ``ok_topk_slow_network.py``: collectives and training steps, in turn, over links of several bandwidths."""

import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _ok_topk import Gradients
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional

from lightning_plugins.engines.sparse_allreduce import OkTopkState, SparseAllreduceState, ok_topk_hook
from lightning_plugins.engines.sparse_allreduce.rivals import ALGORITHMS
from tests.ranks.hosts import Host

DENSITY = 0.01
THRESHOLD_EVERY = 32
WIRES = {"auto exact": ("auto", "exact"), "int32 exact": ("int32", "exact"), "delta16 bfloat16": ("delta16", "bfloat16")}
RIVALS = {"TopkA": "topk_a", "TopkDSA": "topk_dsa", "gTopk": "gtopk", "Gaussian-k": "gaussian_k"}
DENSE, ALONE = "dense", "no communication"
WARM_UP = 6  # steps on unshaped links: connections, residuals, buckets, PowerSGD's dense steps
BURST_BYTES, QUEUE_BYTES, TICKS_PER_S = 64 * 1024, 4 * 1024 * 1024, 250


class Taken(NamedTuple):
    """One timed step.

    Attributes:
        seconds: of the slowest rank.
        exact: whether thresholds were computed exactly.
        sent_bytes: at this rank's interface.
        received_bytes: likewise.
    """

    seconds: float
    exact: bool
    sent_bytes: int
    received_bytes: int


class Contestant:
    """Something whose steps are timed.

    Args:
        prepare: is called before each step, outside of the timing.
        step: what is timed.
        core: whose thresholds it uses, if it has any.
    """

    def __init__(
        self, prepare: Callable[[], Any], step: Callable[[], Any], core: Callable[[], SparseAllreduceState] | None = None
    ) -> None:
        self.prepare, self.step, self.core = prepare, step, core

    def take(self) -> Taken:
        """Run one step on all ranks at the same time."""
        self.prepare()
        exact = self.core is not None and self.core().due
        dist.barrier()
        sent, received = counters()
        start_s = time.perf_counter()
        self.step()
        seconds = torch.tensor(time.perf_counter() - start_s, dtype=torch.float64)
        after = counters()
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return Taken(float(seconds), exact, after[0] - sent, after[1] - received)

    def make_due(self) -> None:
        """Let the next step compute its thresholds exactly."""
        if self.core is not None:
            self.core().step = 0


@dataclass
class Plan:
    """What to measure.

    Attributes:
        hosts: of the ranks.
        bandwidths_mbit: of each link, in turn; None leaves the links unshaped.
        seconds: that a contestant may spend at one bandwidth; three steps are taken at least.
        most: steps of a contestant at one bandwidth.
        elements: of the vector.
        net: width, blocks, context and sequences of the network.
        tune_mbit: bandwidth at which settings are compared.
    """

    hosts: list[Host]
    bandwidths_mbit: list[float | None]
    seconds: float
    most: int
    elements: int = 1 << 22
    net: tuple[int, int, int, int] = (256, 5, 64, 2)
    tune_mbit: float = 500.0


@dataclass
class Measured:
    """Steps by bandwidth and contestant, and the settings that were chosen."""

    taken: dict[float | None, dict[str, list[Taken]]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    tuning: list[tuple[str, str, float]] = field(default_factory=list)  # contestant, setting, median seconds
    parameters: int = 0


def collectives(rank: int, ranks: int, plan: Plan) -> Measured:
    """Time whole reductions of a vector with error feedback, each algorithm with a residual of its own."""
    shape(rank, plan.hosts, None)
    gradients = Gradients(plan.elements, rank)
    k = round(DENSITY * plan.elements)
    contestants = {}
    for name in (DENSE, *(f"Ok-Topk, {wire}" for wire in WIRES), *RIVALS):
        acc = torch.zeros(plan.elements)
        if name == DENSE:
            contestants[name] = Contestant(lambda acc=acc: acc.copy_(gradients.next()), lambda acc=acc: dist.all_reduce(acc))
            continue
        indices, values = WIRES.get(name.removeprefix("Ok-Topk, "), ("auto", "exact"))
        state = SparseAllreduceState(indices=indices, values=values, threshold_every=THRESHOLD_EVERY)
        reduce = ALGORITHMS[RIVALS.get(name, "ok_topk")]
        contestants[name] = Contestant(
            lambda acc=acc: acc.add_(gradients.next()),
            lambda acc=acc, state=state, reduce=reduce: reduce(acc, k, state=state),
            None if name in RIVALS else (lambda state=state: state),
        )
    for contestant in contestants.values():
        warm_up(contestant)
    return sweep(rank, plan, contestants, Measured(parameters=plan.elements))


def training(rank: int, ranks: int, plan: Plan) -> Measured:
    """Time whole training steps of a transformer in plain DDP, with every hook that was asked for in the best of its settings."""
    measured = Measured()
    contestants: dict[str, Contestant] = {}
    for name, settings in grid().items():
        found: list[tuple[float, str, Contestant]] = []
        for setting in settings:
            shape(rank, plan.hosts, None)
            contestant = make(name, setting, rank, plan)
            warm_up(contestant)
            if len(settings) > 1:
                shape(rank, plan.hosts, plan.tune_mbit)
            seconds = statistics.median(contestant.take().seconds for _ in range(3 if len(settings) > 1 else 1))
            found.append((seconds, _text(setting), contestant))
            measured.tuning.append((name, _text(setting), seconds))
        _, measured.settings[name], contestants[name] = min(found, key=lambda one: one[0])
    dense = contestants[DENSE].step.__self__  # type: ignore[attr-defined]
    contestants[ALONE] = Contestant(dense.prepare, dense.alone)
    measured.parameters = sum(parameter.numel() for parameter in dense.ddp.parameters())
    return sweep(rank, plan, contestants, measured)


def grid() -> dict[str, list[dict[str, Any]]]:
    """Return the settings that are tried of each hook: bucket sizes where buckets may overlap, batching of PowerSGD's.

    What is called streamed has several buckets, so that it does overlap; all in one bucket is what ``global`` is for.
    """
    caps = [{"bucket_cap_mb": cap} for cap in (5, 25)]
    several = [{"bucket_cap_mb": cap} for cap in (2.5, 5)]
    found: dict[str, list[dict[str, Any]]] = {DENSE: caps, "fp16": caps}
    for rank in (1, 2, 4):
        # More than one bucket is not safe on gloo: its threads may start their collectives in another order on every rank.
        found[f"PowerSGD rank {rank}"] = [
            {"bucket_cap_mb": 1000, "rank": rank, "batch_tensors_with_same_shape": batched} for batched in (False, True)
        ]
    for mode in ("streamed", "global"):
        for wire in ("auto exact", "delta16 bfloat16"):
            tried = several if mode == "streamed" else caps
            found[f"Ok-Topk {mode}, {wire}"] = [{**cap, "mode": mode, "wire": wire} for cap in tried]
    return found


class Step:
    """A training step of a network of its own.

    Args:
        rank: whose batches these are.
        plan: sizes.
        bucket_cap_mb: of DDP.
    """

    def __init__(self, rank: int, plan: Plan, bucket_cap_mb: float) -> None:
        torch.manual_seed(0)
        self.ddp = nn.parallel.DistributedDataParallel(
            ByteTransformer(*plan.net[:3]), bucket_cap_mb=bucket_cap_mb, gradient_as_bucket_view=True
        )
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.01, momentum=0.9)
        self._generator = torch.Generator().manual_seed(1 + rank)
        self._size = (plan.net[3], plan.net[2] + 1)
        self._bytes = torch.zeros(self._size, dtype=torch.int64)

    def prepare(self) -> None:
        """Draw a batch: sums of two random bytes and the one before, a pattern that can be learned."""
        drawn = torch.randint(0, 16, self._size, generator=self._generator)
        self._bytes = drawn + 16 * drawn.roll(1, dims=1)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        logits = self.ddp(self._bytes[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), self._bytes[:, 1:].flatten()).backward()
        self.optimizer.step()

    def alone(self) -> None:
        """Do the same without any communication."""
        with self.ddp.no_sync():
            self()


class ByteTransformer(nn.Module):
    """Predicts every next byte: ``(N, T)`` bytes to logits ``(N, T, 256)``."""

    def __init__(self, width: int, blocks: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Parameter(0.02 * torch.randn(context, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.mask: Tensor
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, bytes_NT: Tensor) -> Tensor:
        return self.head(self.blocks(self.bytes(bytes_NT) + self.places, mask=self.mask, is_causal=True))


def make(name: str, setting: dict[str, Any], rank: int, plan: Plan) -> Contestant:
    """Return a contestant with a network of its own."""
    step = Step(rank, plan, setting["bucket_cap_mb"])
    core = None
    if name == "fp16":
        step.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif name.startswith("PowerSGD"):
        state = powerSGD_hook.PowerSGDState(
            None,
            matrix_approximation_rank=setting["rank"],
            start_powerSGD_iter=2,
            batch_tensors_with_same_shape=setting["batch_tensors_with_same_shape"],
        )
        step.ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif name.startswith("Ok-Topk"):
        indices, values = WIRES[setting["wire"]]
        ours = OkTopkState(
            step.ddp, DENSITY, mode=setting["mode"], indices=indices, values=values, threshold_every=THRESHOLD_EVERY
        )
        step.ddp.register_comm_hook(ours, ok_topk_hook)
        core = lambda: ours.cores[0]  # noqa: E731
    return Contestant(step.prepare, step.__call__, core)


def sweep(rank: int, plan: Plan, contestants: dict[str, Contestant], measured: Measured) -> Measured:
    """Time all contestants in turn at each bandwidth, until each has spent its seconds."""
    shuffle = random.Random(0)  # the same order on every rank
    for bandwidth in plan.bandwidths_mbit:
        shape(rank, plan.hosts, bandwidth)
        taken: dict[str, list[Taken]] = {name: [] for name in contestants}
        for contestant in contestants.values():
            contestant.make_due()
        active = list(contestants)
        while active:
            shuffle.shuffle(active)
            for name in active:
                taken[name].append(contestants[name].take())
            active = [name for name in active if not _enough(taken[name], plan)]
        measured.taken[bandwidth] = taken
    shape(rank, plan.hosts, None)
    return measured


def warm_up(contestant: Contestant) -> None:
    """Take the steps that do not count."""
    for _ in range(WARM_UP):
        contestant.take()


def _enough(taken: list[Taken], plan: Plan) -> bool:
    spent_s = sum(one.seconds for one in taken)
    return len(taken) >= plan.most or (spent_s > plan.seconds and len(taken) >= 3)


def _text(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def shape(rank: int, hosts: list[Host], bandwidth_mbit: float | None) -> None:
    """Give every link a bandwidth, both ends of it, while no rank sends; None takes the limit off."""
    dist.barrier()
    if rank == 0:
        for number, host in enumerate(hosts):
            for namespace, interface in ((host.name, host.interface), (host.switch, f"port{number}")):
                _shape(namespace, interface, bandwidth_mbit)
    dist.barrier()


def _shape(namespace: str, interface: str, bandwidth_mbit: float | None) -> None:
    command = ["tc", "-n", namespace, "qdisc"]
    if bandwidth_mbit is None:
        # There may be none.
        subprocess.run([*command, "del", "dev", interface, "root"], capture_output=True, check=False)
        return
    rate = int(bandwidth_mbit * 1e6 / 8)  # tc's "bps" are bytes a second
    burst = max(BURST_BYTES, rate // TICKS_PER_S)
    rule = ["rate", f"{rate}bps", "burst", f"{burst}", "limit", f"{QUEUE_BYTES}"]
    subprocess.run([*command, "replace", "dev", interface, "root", "tbf", *rule], capture_output=True, check=True)


def counters() -> tuple[int, int]:
    """Return the bytes that this rank's interface has sent and received, headers included."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = numbers.split()
            return int(fields[8]), int(fields[0])
    raise RuntimeError(f"there is no interface {interface} in this network namespace")
