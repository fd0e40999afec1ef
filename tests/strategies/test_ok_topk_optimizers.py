"""OkTopkStrategy with optimizers of one's own: several of them, manual optimization, and gradient scalers."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins import OkTopkStrategy
from lightning_plugins._lightning import submodule
from lightning_plugins.engines.sparse_allreduce import OkTopkState, ok_topk_hook
from tests.strategies.ok_topk_parts import BUCKETS, STEPS, Net, assert_same, batch, fit, flat

pytestmark = pytest.mark.adapter

EXACT = {"density": 0.05, "threshold": "exact"}
BATCHES = 4


class Two(Net):
    """Two optimizers, each for a part of the layers and with a backward pass of its own.

    Args:
        bad: ``(number of the batch, rank, part)`` of losses that are NaN.
        together: both step after both passes.
        stale: the second pass finds the gradients of the first still there.
    """

    def __init__(self, bad=(), together=False, stale=False):
        super().__init__(bad=bad)
        self.automatic_optimization, self.together, self.stale = False, together, stale or together

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in (self.layers[:3], self.layers[3:])]

    def forward(self, x, part):
        return self.layers[:3](x).square().mean() if part == 0 else self.layers[3:](x[:, [*range(12), 0, 1, 2, 3]]).exp().mean()

    def training_step(self, _, batch_idx):
        x, optimizers = batch(batch_idx, self.global_rank), self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part, optimizer in enumerate(optimizers):
            if not self.stale:
                self.zero_grad()
            factor = float("nan") if (batch_idx, self.global_rank, part) in self.bad else 1.0
            self.manual_backward(factor * self(x, part))
            if not self.together:
                optimizer.step()
        if self.together:
            for optimizer in optimizers:
                optimizer.step()


def two_by_hand(rank, without=()):
    module = Two()
    ddp = DistributedDataParallel(module, find_unused_parameters=True, **BUCKETS)
    state = OkTopkState(ddp, **EXACT, unused_parameters=True)
    ddp.register_comm_hook(state, ok_topk_hook)
    optimizers = module.configure_optimizers()
    for number in range(BATCHES):
        for part, optimizer in enumerate(optimizers):
            if (number, part) not in without:
                module.zero_grad()
                ddp(batch(number, rank), part).backward()
                optimizer.step()
    state.close()
    return {"weights": flat(module.parameters()), "residual": flat(state.rank_state_dict()["residual"].values())}


def train_two(rank, world_size):
    found = {"by hand": two_by_hand(rank), "second left out": two_by_hand(rank, {(2, 1)})}
    for name, bad, together, stale in (
        ("fine", (), False, False),
        ("second bad", {(2, 1, 1)}, False, False),
        ("stale", (), False, True),
        ("together", (), True, True),
        ("first bad, together", {(2, 1, 0)}, True, True),
    ):
        strategy = OkTopkStrategy(**EXACT, find_unused_parameters=True, log_every=1, **BUCKETS)
        found[name] = fit(module := Two(bad, together, stale), world_size, strategy, max_steps=2 * BATCHES)
        found[name]["residual"] = flat(strategy.rank_state_dict()["residual"].values())
        found[name]["sent_mb"] = module.trainer.callback_metrics["ok_topk/sent_mb"]
    return found


def test_several_optimizers_step_by_manual_optimization(ranks):
    for found in ranks.run(train_two, 2):
        assert_same(found["fine"], found["by hand"], "fine")
        assert_same(found["second bad"], found["second left out"], "second bad")
        assert found["first bad, together"]["weights"].isfinite().all(), "the second pass hid that the first was left out"
        assert found["together"]["sent_mb"] > 0, "the second optimizer to step logged that nothing was sent"


def test_gradients_that_another_pass_has_left_are_not_sent_again(ranks):
    for found in ranks.run(train_two, 2):
        assert_same(found["stale"], found["by hand"], "stale")
        assert_same(found["together"], found["by hand"], "together")
        assert found["first bad, together"]["skipped"] == 1


class Scaled(Net):
    """Trains in float32 under a gradient scaler, whose powers of two leave no rounding."""

    def __init__(self, numbers=None, overflow=()):
        super().__init__(numbers)
        self.overflow, self.scales, self.waiting = set(overflow), [], []

    def training_step(self, _, batch_idx):
        number = self.numbers[self.global_step]
        with torch.autocast("cpu", enabled=False):
            loss = self(batch(number, self.global_rank))
        return loss * 1e37 if (number, self.global_rank) in self.overflow else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.scales.append(getattr(self.trainer.precision_plugin, "scaler", torch.amp.GradScaler("cpu", 1.0)).get_scale())
        self.waiting.append(flat(self.trainer.strategy.rank_state_dict()["residual"].values()))


def train_scaled(rank, world_size):
    found = {}
    for name, scaled, overflow, steps, numbers in (
        ("float32", False, (), STEPS, None),
        ("scaled", True, (), STEPS, None),
        ("overflowing", True, {(3, 1)}, STEPS, None),
        ("without", False, (), STEPS - 1, [0, 1, 2, 4, 5]),
    ):
        for mode in ("streamed", "global"):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
            mixed = submodule("plugins.precision").MixedPrecision("16-mixed", "cpu", scaler)
            module, strategy = Scaled(numbers, overflow), OkTopkStrategy(density=0.05, threshold_every=3, mode=mode, **BUCKETS)
            results = fit(module, world_size, strategy, max_steps=steps, plugins=[mixed] if scaled else None)
            found[name, mode] = results, module.scales, module.waiting
    return found


def test_a_scaler_leaves_its_step_out_and_residuals_are_kept_without_its_factor(ranks):
    for found in ranks.run(train_scaled, 2):
        for mode in ("streamed", "global"):
            scaled, scales, _ = found["scaled", mode]
            assert len(set(scales)) > 2, "the factor grew on the way"
            assert_same(scaled, found["float32", mode][0], "scaled")
            left_out, scales, waiting = found["overflowing", mode]
            assert scales[3] < scales[2], "the scaler has seen the overflow, and lowered its factor"
            assert torch.equal(waiting[3], waiting[2])
            assert left_out["skipped"] == 1
            assert_same(left_out, found["without", mode][0], "overflowing", but=("skipped",))


def train_in_float16(rank, world_size):
    mixed = submodule("plugins.precision").MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**60))
    return fit(Net(), world_size, OkTopkStrategy(**EXACT, **BUCKETS), max_steps=60, plugins=[mixed])


def test_float16_trains_once_the_scaler_has_found_its_factor(ranks):
    first, second = ranks.run(train_in_float16, 2)
    assert_same(first, second, but=("residual",))
    assert first["skipped"] > 30
    assert first["steps"] == 60 - first["skipped"]
    assert first["weights"].isfinite().all()
