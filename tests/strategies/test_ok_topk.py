"""OkTopkStrategy in a real Trainer on several processes. Oracle: DDP, the hook and an optimizer in a plain loop, bit for bit."""

import pytest
import torch
from torch import nn

from lightning_plugins import OkTopkStrategy
from lightning_plugins._lightning import DDPStrategy
from tests.strategies.ok_topk_parts import BUCKETS, OPTIONS, STEPS, Net, assert_same, fit, plain

pytestmark = pytest.mark.adapter

MODES = {
    "streamed": OPTIONS,
    "global": {**OPTIONS, "mode": "global"},
    "per_bucket": {**OPTIONS, "mode": "per_bucket", "threshold": "reused"},
}


def strategy(options, **ddp):
    return OkTopkStrategy(**options, **BUCKETS, **ddp)


def train(rank, world_size, cases):
    """Train by Trainer and by hand with each of some options."""
    found = {}
    for name, (options, ddp, trainer, by_hand) in cases.items():
        found[name] = fit(Net(), world_size, strategy(options, **ddp), **trainer), plain(rank, world_size, options, **by_hand)
    return found


def check(results):
    """Compare Trainer and loop of each rank, and the ranks with each other; return what the first has by Trainer."""
    for of_rank in results:
        for name, (trained, by_hand) in of_rank.items():
            assert_same(trained, by_hand, name)
            assert_same(trained, results[0][name][0], f"ranks apart: {name}", but=("residual",))
            assert trained["residual"].any(), f"{name}: nothing waits, so that all was sent"
    return {name: trained for name, (trained, _) in results[0].items()}


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_mode_does_what_the_hook_does_in_plain_ddp(ranks, world_size):
    found = check(ranks.run(train, world_size, {name: (options, {}, {}, {}) for name, options in MODES.items()}))
    assert_same(found["streamed"], found["global"], "streamed and global")
    assert not torch.equal(found["streamed"]["weights"], found["per_bucket"]["weights"])


def test_accumulation_clipping_and_mixed_precision_do_what_they_do_in_plain_ddp(ranks):
    bf16 = {"precision": "bf16-mixed"}
    found = check(
        ranks.run(
            train,
            2,
            {
                "one": (OPTIONS, {}, {}, {}),
                "accumulated": (OPTIONS, {}, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
                "clipped after": (OPTIONS, {}, {"gradient_clip_val": 0.05}, {"clip": 0.05}),
                "clipped before": ({**OPTIONS, "mode": "global", "clip_norm": 0.05}, {}, {}, {}),
                "bf16-mixed": (OPTIONS, {}, bf16, {"autocast": True}),
                "bfloat16 values": ({**OPTIONS, "values": "bfloat16"}, {}, {}, {}),
            },
        )
    )
    assert found["accumulated"]["steps"] == STEPS, "one exchange of k entries for each synchronisation"
    for name, trained in found.items():
        assert name == "one" or not torch.equal(trained["weights"], found["one"]["weights"]), f"{name} does nothing"


def train_in_other_ways(rank, world_size):
    exact = {"density": 0.05, "threshold": "exact"}  # in which order buckets use the budget up does not matter then
    found = {"as ever": fit(Net(), world_size, strategy(exact))}
    for name in ("gradient_as_bucket_view", "static_graph", "find_unused_parameters"):
        found[name] = fit(Net(), world_size, strategy(exact, **{name: True}))
    found["bf16-true"] = fit(Net(), world_size, strategy(exact), precision="bf16-true")
    return found


def test_options_of_ddp_change_nothing_and_weights_may_be_bfloat16(ranks):
    first, second = ranks.run(train_in_other_ways, 2)
    for name, trained in first.items():
        assert_same(trained, second[name], f"ranks apart: {name}", but=("residual",))
        if name != "bf16-true":
            assert_same(trained, first["as ever"], name)
    assert first["bf16-true"]["weights"].dtype == torch.bfloat16
    assert first["bf16-true"]["residual"].dtype == torch.float32


def train_densely(rank, world_size):
    found = {}
    for steps in (STEPS, 3):
        found[steps] = fit(Net(), world_size, strategy({**OPTIONS, "dense_steps": STEPS}), max_steps=steps)
    found["ddp"] = fit(Net(), world_size, DDPStrategy(**BUCKETS))
    found["all"] = fit(Net(), world_size, strategy({"density": 1.0, "threshold": "exact"}))
    found["late"] = fit(Net(), world_size, strategy({**OPTIONS, "dense_steps": 3}))
    return found


def test_dense_steps_and_a_density_of_one_are_ddp_to_rounding(ranks):
    first, second = ranks.run(train_densely, 2)
    for name in (STEPS, "all"):
        torch.testing.assert_close(first[name]["weights"], first["ddp"]["weights"], rtol=0, atol=1e-5)
        assert not first[name]["residual"].any()
        assert torch.equal(first[name]["weights"], second[name]["weights"])
    assert first["late"]["residual"].any(), "sparse after its dense steps"
    assert (first["late"]["weights"] - first["ddp"]["weights"]).abs().max() > 1e-4


class Branches(Net):
    """Uses its second branch in every other step alone."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(12, 16)
        self.waiting, self.branch_weights = [], []

    def training_step(self, _, batch_idx):
        x = self.batch(batch_idx)
        hidden = torch.tanh(self.layers[0](x))
        if batch_idx % 2 == 0:
            hidden = hidden + 5 * torch.tanh(self.branch(x))
        return self.layers[4](torch.tanh(self.layers[2](hidden))).square().mean() - hidden.mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.waiting.append(self.trainer.strategy.rank_state_dict()["residual"]["branch.weight"])
        self.branch_weights.append(self.branch.weight.detach().clone())


def train_branches(rank, world_size, mode):
    module = Branches()
    found = fit(module, world_size, strategy({**OPTIONS, "mode": mode}, find_unused_parameters=True), max_steps=4)
    return found, module.waiting, module.branch_weights


def test_what_waits_for_an_unused_parameter_goes_on_waiting(ranks):
    for mode in ("streamed", "per_bucket"):
        (first, waiting, weights), (second, *_) = ranks.run(train_branches, 2, mode)
        assert torch.equal(first["weights"], second["weights"])
        for used, unused in ((0, 1), (2, 3)):
            assert waiting[used].any()
            assert torch.equal(waiting[used], waiting[unused]), f"{mode}: mass was sent that DDP throws away"
            assert torch.equal(weights[used], weights[unused])
        assert not torch.equal(weights[1], weights[2])
