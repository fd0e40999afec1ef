"""What OkTopkStrategy does with gradients that are not finite, and with what it cannot do."""

import signal
import threading
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins import OkTopkFabricStrategy, OkTopkStrategy
from lightning_plugins._support.errors import InputError
from tests.ranks.rank import progress
from tests.strategies.ok_topk_parts import BUCKETS, OPTIONS, STEPS, Net, assert_same, fit, refusal

pytestmark = pytest.mark.adapter

BAD = 3
WITHOUT = [number for number in range(STEPS) if number != BAD]


CASES = {
    "between thresholds": {"threshold_every": 100},
    "per bucket": {"mode": "per_bucket"},
    "global, clipped": {"mode": "global", "clip_norm": 0.05},
}


def leave_out(rank, world_size, cases):
    found = {}
    for name, options in cases.items():
        strategies = [OkTopkStrategy(**{**OPTIONS, **options}, log_every=1, **BUCKETS) for _ in range(2)]
        module = Net(bad={(BAD, 1)})
        bad = fit(module, world_size, strategies[0])
        found[name] = bad, fit(Net(WITHOUT), world_size, strategies[1], max_steps=STEPS - 1), module.trainer.callback_metrics
    return found


def test_a_step_with_nan_on_one_rank_is_as_if_it_had_not_been(ranks):
    for found in ranks.run(leave_out, 2, CASES):
        for name, (bad, without, logged) in found.items():
            assert_same(bad, without, name, but=("skipped",))
            assert bad["skipped"] == 1, name
            assert logged["ok_topk/skipped_count"] == 1


def test_so_is_a_dense_step(ranks):
    for found in ranks.run(leave_out, 2, {"dense": {"dense_steps": BAD + 1}}):
        bad, without, _ = found["dense"]
        assert_same(bad, without, but=("skipped",))
        assert bad["skipped"] == 1


@pytest.mark.parametrize("strategy", [OkTopkStrategy, OkTopkFabricStrategy])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 2}, r"density must be in \(0, 1\], got 2; 0.01 sends 1 %"),
        ({"density": float("nan")}, r"density must be in \(0, 1\], got nan"),
        ({"mode": "stream"}, "no mode='stream'.*streamed"),
        ({"threshold": "exakt"}, "no threshold='exakt'.*exact"),
        ({"cuts": "mean"}, "no cuts='mean'"),
        ({"owners": "me"}, "no owners='me'"),
        ({"indices": "int16"}, "no indices='int16'"),
        ({"values": "float16"}, "no values='float16'"),
        ({"threshold_every": 0}, "threshold_every must be 1 step or more, got 0"),
        ({"repartition_every": 1.5}, "repartition_every must be 1 step or more, got 1.5"),
        ({"dense_steps": -1}, "dense_steps must be a whole number from 0 on, got -1"),
        ({"ranks_per_node": 0}, "ranks_per_node must be a whole number from 1 on, got 0"),
        ({"log_every": -1}, "log_every must be a whole number of steps, got -1"),
        ({"assumption_every": 0.5}, "assumption_every must be a whole number from 0 on, got 0.5"),
        ({"clip_norm": 0.0, "mode": "global"}, "clip_norm must be above 0 and finite, got 0.0"),
        ({"clip_norm": 1.0}, "clip_norm needs the norm of the whole gradient.*use mode='global'"),
        ({"threshold": "sampled"}, "threshold='sampled' samples the whole gradient.*use threshold='servo'"),
        ({"ddp_comm_hook": print}, "ddp_comm_hook cannot act beside Ok-Topk"),
        ({"model_averaging_period": 2}, "model_averaging_period cannot act beside Ok-Topk"),
        ({"treshold": "exact"}, "there is no option 'treshold'; did you mean threshold"),
        ({"find_unused_parameter": True}, "no option 'find_unused_parameter'; did you mean find_unused_parameters"),
        ({"density": "0.01"}, r"density must be in \(0, 1\], got '0.01'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_at_once(strategy, options, sentence):
    with pytest.raises(InputError, match=sentence):
        strategy(**options)


def test_without_a_fit_there_is_no_state():
    with pytest.raises(InputError, match="no state before the fit"):
        OkTopkStrategy().rank_state_dict()
    with pytest.raises(InputError, match="no state before the fit"):
        OkTopkStrategy().load_rank_state_dict({})


class Words(Net):
    def __init__(self, sparse):
        super().__init__()
        self.words = nn.Embedding(10, 12, sparse=sparse)

    def training_step(self, _, batch_idx):
        return functional.mse_loss(self.layers(self.words(torch.arange(8))), torch.ones(8, 3))


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.layers[0].turn = nn.Parameter(torch.ones(3, dtype=torch.complex64))


def workers():
    """Count the threads of fits that are over, a moment later."""
    found = [thread for thread in threading.enumerate() if thread.name == "sparse-allreduce"]
    for thread in found:
        thread.join(timeout=1)
    return sum(thread.is_alive() for thread in found)


def refuse(rank, world_size):
    def tried(module, **options):
        return refusal(fit, module, world_size, OkTopkStrategy(**{**OPTIONS, **BUCKETS, **options}))

    return {
        "too few": tried(Net(), density=0.001),
        "sparse": tried(Words(sparse=True)),
        "complex": tried(Complex()),
        "frozen": tried(Net().requires_grad_(False)),
        "density": tried(Net(), density=0.05 + 0.1 * rank),
        "threshold_every": tried(Net(), threshold_every=3 + rank),
        "model": tried(Net(hidden=16 + 4 * rank)),
        "nodes": tried(Net(), ranks_per_node=2),
        "words": "trained" if fit(Words(sparse=False), world_size, OkTopkStrategy(**OPTIONS)) else "",
        "workers": workers(),
    }


def test_what_cannot_be_trained_is_refused_on_every_rank(ranks):
    first, second = ranks.run(refuse, 2)
    for name, parts in {
        "too few": ("InputError: density 0.001 of 531 parameters is 1 entries, fewer than the 2 ranks; give at least 0.0038",),
        "sparse": ("InputError: words is an embedding with sparse gradients; make it with sparse=False",),
        "complex": ("InputError: layers.0.turn is torch.complex64",),
        "density": ("InputError", "must agree in density: rank 0 has 0.05, rank 1 has 0.15"),
        "threshold_every": ("InputError", "must agree in threshold_every: rank 0 has 3, rank 1 has 4"),
        "model": ("InputError", "the shape of layers.0.bias: rank 0 has [16], rank 1 has [20]"),
        "nodes": ("InputError", "ranks_per_node must divide the 2 ranks into two nodes or more, got 2"),
        "words": ("trained",),
    }.items():
        for said in (first[name], second[name]):
            for part in parts:
                assert part in said, f"{name}: {said}"
    assert first["workers"] == second["workers"] == 0, "workers outlive their fits"


def train_alone(rank, world_size):
    with pytest.warns(UserWarning, match="one process: there is nothing to send"):
        return fit(Net(), 1, OkTopkStrategy(**OPTIONS, **BUCKETS))["residual"].any()


def test_one_process_says_so_and_still_selects(ranks):
    assert ranks.run(train_alone, 1) == [True]


class Waits(Net):
    def training_step(self, _, batch_idx):
        progress(f"step {self.global_step}")
        if self.global_step == 2 and self.global_rank == 1:
            signal.pause()
        return super().training_step(_, batch_idx)


def train_and_wait(rank, world_size):
    message = refusal(fit, Waits(), world_size, OkTopkStrategy(**OPTIONS, **BUCKETS, timeout=timedelta(seconds=2)))
    return message, workers()


@pytest.mark.parametrize("what", ["hangs", "dies"])
def test_a_rank_that_dies_or_hangs_ends_the_others_after_the_timeout_at_the_latest(ranks, what):
    with ranks.start(train_and_wait, 2) as handle:
        handle.wait_for("step 2")
        if what == "dies":
            handle.kill(1)
        handle.join(15, ranks=[0])
        message, left = handle.result(0)
    assert message.startswith(("RuntimeError", "DistBackendError", "DistNetworkError")), message
    assert left == 0
