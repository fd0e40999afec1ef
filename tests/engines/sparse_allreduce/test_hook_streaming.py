"""That a bucket leaves before the last one's gradient exists, and that the measurements say what they should."""

import time

import pytest
import torch
from torch import nn

from lightning_plugins.engines.sparse_allreduce import OkTopkState, ok_topk_hook
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.measuring import assumption_ratio
from tests.engines.sparse_allreduce.hook_parts import loss_of, net, train
from tests.ranks.rank import progress

PAUSE_S = 0.25


class Pause(torch.autograd.Function):
    """Lets backward wait before it goes on to what came before."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(PAUSE_S)
        return gradient


class Slow(nn.Module):
    """Three layers; backward takes its time before the first one's gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(20, 40), nn.Linear(40, 40), nn.Linear(40, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(Pause.apply(torch.tanh(self.first(x))))))


def traced(rank, world_size, mode):
    """Return bytes sent before the last gradient was there, those sent after, and seconds between the first and that gradient."""
    torch.set_num_threads(1)
    module = Slow()
    ddp = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=0.005)
    state = OkTopkState(ddp, 0.1, mode=mode, threshold_every=100)
    ddp.register_comm_hook(state, ok_topk_hook)
    left, ready = [], []
    send = Exchange.all_to_all_bytes

    def watched(self, messages, lengths, phase):
        left.append((time.monotonic(), sum(map(len, messages)) - len(messages[self.rank])))
        return send(self, messages, lengths, phase)

    Exchange.all_to_all_bytes = watched
    module.first.weight.register_hook(lambda gradient: ready.append(time.monotonic()))
    for step in range(5):
        left.clear()
        ready.clear()
        loss_of(ddp, rank, step).backward()
    before = [(at, size) for at, size in left if at < ready[0]]
    return sum(size for _, size in before), sum(size for at, size in left if at >= ready[0]), len(state.layout.segments)


def test_streamed_bytes_leave_before_the_last_gradient_exists(ranks):
    for before, after, segments in ranks.run(traced, 2, "streamed"):
        assert segments > 1
        assert before > 0.2 * (before + after)


def test_global_sends_nothing_before(ranks):
    for before, after, _ in ranks.run(traced, 2, "global"):
        assert before == 0
        assert after > 0


def measured(rank, world_size):
    _, state = train(
        rank, world_size, {"density": 0.05, "measure_every": 1, "assumption_every": 1, "threshold": "exact"}, steps=4
    )
    return state.metrics, state.traffic.sent_bytes


def test_metrics_have_what_the_step_did(ranks):
    for metrics, sent in ranks.run(measured, 3):
        assert metrics["selected_over_k"] == metrics["reached_over_k"] == 1.0
        assert 0.5 < metrics["selected_globally_over_k"] <= 1.0
        assert metrics["residual_over_gradient"] > 0
        assert metrics["gradient_norm"] > 0
        assert 0.0 <= metrics["assumption_ratio"] < 5.0
        assert metrics["skipped_count"] == 0
        assert 0 < metrics["load_imbalance"] <= 1.5
        assert {"split_and_reduce", "allgather", "counts", "cuts", "threshold", "agreement", "assumption"} <= sent.keys()


def test_the_assumption_holds_exactly_where_everything_is_sent():
    acc, residual = torch.randn(50), torch.zeros(50)
    alone = Exchange(None, acc.device)
    assert assumption_ratio(acc, residual, acc.clone(), 50, alone) == 0.0
    nothing = assumption_ratio(acc, residual, torch.zeros(50), 50, alone)
    assert nothing == pytest.approx(1.0)


def advised(rank, world_size, width, density):
    """Return what `auto` decides for a square layer, and which of the first steps were dense."""
    torch.set_num_threads(1)
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(width, width))
    state = OkTopkState(ddp, density, auto=True)
    ddp.register_comm_hook(state, ok_topk_hook)
    dense = ""
    for _ in range(14):
        dense += "d" if state.dense else "s"
        ddp(torch.randn(4, width)).square().mean().backward()
    return state.advice.sparse, state.advice.gain, dense


@pytest.mark.netns
def test_auto_goes_sparse_on_a_slow_link(ranks, hosts):
    slow = hosts(2, bandwidth_bytes_per_s=2.5e6)
    for sparse, gain, dense in ranks.run(advised, 2, 700, 0.01, hosts=slow.place(0, 1)):
        assert sparse is True
        assert gain > 3
        assert dense == "dddddsssssssss"


def test_auto_stays_dense_where_sparse_steps_do_not_pay(ranks):
    """Between two processes of one machine a sparse step works longer than a dense reduction of two million elements takes."""
    for sparse, gain, dense in ranks.run(advised, 2, 1400, 0.2):
        assert sparse is False
        assert gain < 1.1
        assert dense == "dddddssssssddd"


def steps_without_end(rank, world_size):
    module, ddp_and_state = net(), None
    ddp_and_state = nn.parallel.DistributedDataParallel(module)
    state = OkTopkState(ddp_and_state, 0.05)
    ddp_and_state.register_comm_hook(state, ok_topk_hook)
    step = 0
    try:
        while True:
            loss_of(ddp_and_state, rank, step).backward()
            step += 1
            if step == 3:
                progress("training")
    except RuntimeError as error:
        return str(error)


def test_a_rank_that_dies_is_noticed_by_the_others(ranks):
    with ranks.start(steps_without_end, 3, timeout_s=4) as handle:
        handle.wait_for("training")
        killed_at = time.monotonic()
        handle.kill(1)
        assert handle.join(15)[1] == -9
        assert time.monotonic() - killed_at < 10
        for rank in (0, 2):
            assert handle.result(rank)


def other_settings(rank, world_size, options_by_rank, wide_by_rank):
    """Return what a rank is told at its first step; the model may be as large and yet another."""
    torch.set_num_threads(1)
    module = (
        nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 20))
        if wide_by_rank[rank]
        else nn.Sequential(nn.Linear(20, 40, bias=False))
    )
    state = OkTopkState(module, **options_by_rank[rank])
    try:
        state.check_ranks()
    except ValueError as error:
        return str(error)


def first_step(rank, world_size):
    """The same through DDP: the first backward tells."""
    torch.set_num_threads(1)
    module = net()
    ddp = nn.parallel.DistributedDataParallel(module)
    ddp.register_comm_hook(OkTopkState(ddp, 0.05 if rank == 0 else 0.1), ok_topk_hook)
    try:
        loss_of(ddp, rank, 0).backward()
    except RuntimeError as error:
        return str(error)


def test_ranks_that_differ_are_named_on_all_ranks(ranks):
    told = ranks.run(other_settings, 2, [{"density": 0.05}, {"density": 0.1}], [1, 1])
    assert told[0] == told[1]
    assert told[0].startswith("the ranks must agree in density: rank 0 has 0.05, rank 1 has 0.1; give all ranks the same model")
    told = ranks.run(other_settings, 2, [{"density": 0.05}, {"density": 0.05}], [1, 0])
    assert told[0] == told[1]
    assert "must agree in" in told[0]
    told = ranks.run(other_settings, 3, [{"values": "exact"}, {"values": "exact"}, {"values": "bfloat16"}], [1, 1, 1])
    assert len(set(told)) == 1
    assert "values: rank 0 has exact, rank 2 has bfloat16" in told[0]
    for said in ranks.run(first_step, 2):
        assert "must agree in density: rank 0 has 0.05, rank 1 has 0.1" in said
