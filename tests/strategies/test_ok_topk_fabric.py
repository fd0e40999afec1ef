"""OkTopkFabricStrategy in a loop of one's own. Oracle: the same loop with DDP and the hook, bit for bit."""

from importlib import import_module

import pytest
import torch

from lightning_plugins import OkTopkFabricStrategy
from lightning_plugins._lightning import NAMESPACE
from tests.strategies.ok_topk_parts import BUCKETS, OPTIONS, STEPS, Net, assert_same, batch, outcome, plain, refusal

pytestmark = pytest.mark.adapter


def start(world_size, **options):
    fabric = import_module("lightning_fabric" if NAMESPACE == "pytorch_lightning" else "lightning.fabric").Fabric(
        accelerator="cpu", devices=world_size, strategy=OkTopkFabricStrategy(**{**OPTIONS, **BUCKETS, **options})
    )
    fabric.launch()
    return fabric


class Loop:
    """A module and its optimizer, set up, and as many steps as wanted."""

    def __init__(self, world_size, hidden=16, **options):
        torch.set_num_threads(1)
        self.fabric = start(world_size, **options)
        self.module = Net(hidden=hidden)
        self.optimizer = self.module.configure_optimizers()
        self.wrapped, self.wrapped_optimizer = self.fabric.setup(self.module, self.optimizer)

    def train(self, numbers, accumulate=1, bad=(), clip=None):
        for number in numbers:
            self.wrapped_optimizer.zero_grad()
            for part in range(accumulate):
                x = batch(number * accumulate + part, self.fabric.global_rank)
                if (number, self.fabric.global_rank) in bad:
                    x = x * float("nan")
                with self.fabric.no_backward_sync(self.wrapped, enabled=part + 1 < accumulate):
                    self.fabric.backward(self.wrapped(x) / accumulate)
            if clip is not None:
                self.fabric.clip_gradients(self.wrapped, self.wrapped_optimizer, max_norm=clip)
            self.wrapped_optimizer.step()
        return outcome(self.module, self.optimizer, self.fabric.strategy.ok_topk)

    def save(self, path):
        self.fabric.save(path, {"model": self.wrapped, "optimizer": self.wrapped_optimizer, "step": 4})

    def load(self, path):
        return self.fabric.load(path, {"model": self.wrapped, "optimizer": self.wrapped_optimizer})


def train(rank, world_size):
    found = {}
    for mode in ("streamed", "global", "per_bucket"):
        found[mode] = Loop(world_size, mode=mode).train(range(STEPS)), plain(rank, world_size, {**OPTIONS, "mode": mode})
    accumulated = Loop(world_size).train(range(STEPS), accumulate=2)
    found["accumulated"] = accumulated, plain(rank, world_size, OPTIONS, accumulate=2)
    found["clipped"] = Loop(world_size).train(range(STEPS), clip=0.05), plain(rank, world_size, OPTIONS, clip=0.05)
    return found


def test_it_does_what_the_hook_does_in_plain_ddp(ranks):
    first, second = ranks.run(train, 2)
    for name in first:
        for of_rank in (first, second):
            assert_same(*of_rank[name], name)
        assert_same(first[name][0], second[name][0], f"ranks apart: {name}", but=("residual",))
        assert first[name][0]["residual"].any()
        assert first[name][0]["steps"] == STEPS


def leave_out(rank, world_size):
    without = [number for number in range(STEPS) if number != 3]
    return Loop(world_size).train(range(STEPS), bad={(3, 1)}), Loop(world_size).train(without)


def test_a_step_with_nan_on_one_rank_is_as_if_it_had_not_been(ranks):
    for bad, without in ranks.run(leave_out, 2):
        assert bad["skipped"] == 1
        assert_same(bad, without, but=("skipped",))


class Steps:
    """Batches of whose passes one is bad on rank 1, with optimizers that step in ways of their own."""

    def __init__(self, world_size):
        self.loop = Loop(world_size)
        self.bad = {(2, 1)}

    def backward(self, number, optimizers):
        for optimizer in optimizers:
            optimizer.zero_grad()
        rank = self.loop.fabric.global_rank
        loss = self.loop.wrapped(batch(number, rank) * (float("nan") if (number, rank) in self.bad else 1.0))
        self.loop.fabric.backward(loss)
        return loss

    def finite(self):
        skipped = self.loop.fabric.strategy.ok_topk.skipped_count
        return skipped, all(bool(parameter.isfinite().all()) for parameter in self.loop.module.parameters())


def step_in_other_ways(rank, world_size):
    found = {}
    steps = Steps(world_size)
    halves = [list(steps.loop.module.layers[place].parameters()) for place in (0, 2)]
    optimizers = [steps.loop.fabric.setup_optimizers(torch.optim.SGD(half, lr=0.1)) for half in halves]
    for number in range(4):
        steps.backward(number, optimizers)
        for optimizer in optimizers:
            optimizer.step()
    found["two optimizers"] = steps.finite()
    steps = Steps(world_size)
    for number in range(4):
        steps.loop.wrapped_optimizer.step(lambda number=number: steps.backward(number, [steps.loop.wrapped_optimizer]))
    found["a closure"] = steps.finite()
    steps = Steps(world_size)
    for number in range(4):
        steps.backward(number, [steps.loop.wrapped_optimizer])
        steps.loop.fabric.clip_gradients(steps.loop.wrapped, steps.loop.wrapped_optimizer, max_norm=0.1)
        steps.loop.wrapped_optimizer.step()
    found["clipping, where what is not finite is an error"] = steps.finite()
    return found


def test_nan_reaches_no_weight_however_the_optimizer_steps(ranks):
    for found in ranks.run(step_in_other_ways, 2):
        assert found == dict.fromkeys(found, (1, True))


def load_first(rank, world_size, path):
    """Read the weights before anything is set up, as one does who builds the model from the checkpoint."""
    whole = Loop(world_size)
    whole.train(range(4))
    whole.save(path)
    expected = whole.train(range(4, STEPS))
    fabric = start(world_size)
    module = Net()
    optimizer = module.configure_optimizers()
    state = fabric.load(path)
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    late = Loop.__new__(Loop)
    late.fabric, late.module, late.optimizer = fabric, module, optimizer
    late.wrapped, late.wrapped_optimizer = fabric.setup(module, optimizer)
    return late.train(range(4, STEPS)), expected


def test_residuals_that_are_loaded_before_setup_are_there_after_it(ranks, tmp_path):
    for late, expected in ranks.run(load_first, 2, str(tmp_path / "a.ckpt")):
        assert_same(late, expected)


def resume(rank, world_size, path):
    whole = Loop(world_size)
    whole.train(range(4))
    whole.save(path)
    found = {"whole": whole.train(range(4, STEPS))}
    resumed = Loop(world_size)
    left = resumed.load(path)
    found["resumed"] = resumed.train(range(4, STEPS))
    return found, left, refusal(Loop(world_size, hidden=20).fabric.load, path)


def test_a_run_goes_on_from_what_was_saved_with_the_same_bits(ranks, tmp_path):
    path = str(tmp_path / "a.ckpt")
    results = ranks.run(resume, 2, path)
    for found, left, another_model in results:
        assert_same(found["resumed"], found["whole"])
        assert left == {"step": 4}, "what is ours is not handed to the user"
        assert "InputError: the state is of another model: parameter layers.0.weight is 16x12 in it and 20x12" in another_model


def refuse(rank, world_size):
    before = refusal(OkTopkFabricStrategy().rank_state_dict)
    loop = Loop(world_size)
    return (
        before,
        refusal(loop.fabric.setup, Net()),
        refusal(Loop, world_size, density=0.05 + 0.1 * rank),
        refusal(Loop, world_size, density=0.001),
    )


def test_what_cannot_be_is_refused_on_every_rank(ranks):
    for before, second, density, few in ranks.run(refuse, 2):
        assert "no state before fabric.setup(module); call that first" in before
        assert "InputError: OkTopkFabricStrategy keeps the residuals of one module" in second
        assert "InputError" in density
        assert "must agree in density: rank 0 has 0.05, rank 1 has 0.15" in density
        assert "InputError: density 0.001 of 531 parameters is 1 entries, fewer than the 2 ranks" in few
