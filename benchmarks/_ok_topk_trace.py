"""The ranks' side of ``ok_topk_trace.py``: backward passes, every gradient and every collective with its time."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_plugins.engines.sparse_allreduce import OkTopkState, ok_topk_hook
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange

COLLECTIVES = ("all_to_all_integers", "all_gather_integers", "all_to_all_bytes", "all_gather_bytes", "add", "largest_integers")
EXACT_EVERY = 16
WARM_UP = 2 * EXACT_EVERY + 1  # steps: the last of them is an exact one


class Event(NamedTuple):
    """Something that happened in the watched pass; times are seconds since backward began.

    Attributes:
        kind: ``gradient`` or ``collective``.
        name: of the parameter, or of the call and its phase.
        start_s: when the gradient was there, or the call began.
        end_s: when the call returned, and everybody's bytes had arrived.
        sent_bytes: to other ranks.
    """

    kind: str
    name: str
    start_s: float
    end_s: float
    sent_bytes: int


class Pause(torch.autograd.Function):
    """Lets backward wait as long as an accelerator would compute, with the processor free meanwhile."""

    @staticmethod
    def forward(context: Any, x: Tensor, seconds: float) -> Tensor:
        context.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(context.seconds)
        return gradient, None


class Block(nn.Module):
    """A layer added to its input, so that all layers have gradients of the same order."""

    def __init__(self, width: int, pause_s: float) -> None:
        super().__init__()
        self.layer, self.pause_s = nn.Linear(width, width), pause_s

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return x + (Pause.apply(y, self.pause_s) if self.pause_s else y)


def trace(rank: int, ranks: int, mode: str, layers: int, width: int, batch: int, pause_s: float) -> list[list[Event]]:
    """Train in plain DDP and return the events of each ordinary step between two exact ones.

    Args:
        rank: of this process.
        ranks: how many there are.
        mode: of the hook.
        layers: of the network, a bucket each.
        width: of each layer.
        batch: of each rank.
        pause_s: that backward waits at each layer.
    """
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(width, pause_s) for _ in range(layers)))
    ddp = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=4 * (width * width + width) / 2**20)
    state = OkTopkState(ddp, 0.01, mode=mode, threshold_every=EXACT_EVERY)
    ddp.register_comm_hook(state, ok_topk_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    events: list[Event] = []
    for name, parameter in net.named_parameters():
        # Called as soon as the gradient has been computed, before DDP hears of it.
        parameter.register_hook(lambda _, name=name: events.append(_now("gradient", name)))
    for name in COLLECTIVES:
        setattr(state.exchange, name, _timed(name, state.exchange, events))
    generator = torch.Generator().manual_seed(1 + rank)
    watched = []
    for step in range(WARM_UP + EXACT_EVERY - 1):
        inputs, targets = torch.randn(2, batch, width, generator=generator)
        optimizer.zero_grad()
        loss = (ddp(inputs) - targets).square().mean()
        dist.barrier()
        events.clear()
        start_s = time.perf_counter()
        loss.backward()
        optimizer.step()
        if step >= WARM_UP:
            watched.append([event._replace(start_s=event.start_s - start_s, end_s=event.end_s - start_s) for event in events])
    state.close()
    return watched


def _now(kind: str, name: str) -> Event:
    now_s = time.perf_counter()
    return Event(kind, name, now_s, now_s, 0)


def _timed(name: str, exchange: Exchange, events: list[Event]) -> Callable[..., Any]:
    """Return a method that does the same, and notes when and how many bytes."""
    method = getattr(exchange, name)

    def call(*arguments: Any) -> list[Tensor]:
        start_s, before = time.perf_counter(), exchange.traffic.total_bytes()[0]
        result = method(*arguments)
        sent = exchange.traffic.total_bytes()[0] - before
        events.append(Event("collective", f"{name} for {arguments[-1]}", start_s, time.perf_counter(), sent))
        return result

    return call
