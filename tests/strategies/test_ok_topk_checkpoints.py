"""Runs with OkTopkStrategy that are resumed: with the same bits on as many ranks, with the same mass on another number."""

import warnings

import pytest
import torch
from torch.nn import functional

from lightning_plugins import OkTopkStrategy, Preconditioner
from tests.strategies.ok_topk_parts import BUCKETS, OPTIONS, Net, assert_same, fit, refusal

pytestmark = pytest.mark.adapter

CASES = {
    "streamed in bfloat16": {"values": "bfloat16"},
    "global after a dense step": {"mode": "global", "dense_steps": 1},
    "per bucket, reused": {"mode": "per_bucket", "threshold": "reused"},
}


def strategy(**options):
    return OkTopkStrategy(**{**OPTIONS, **BUCKETS, **options})


def resume(rank, world_size, folder, cases, module=Net, callbacks=lambda: []):
    """Train whole, saving twice, and again from both checkpoints."""
    found = {}
    for number, (name, options) in enumerate(cases.items()):
        save = {step: f"{folder}/{number}-{step}.ckpt" for step in (2, 4)}
        found[name] = [fit(module(save=save), world_size, strategy(**options), callbacks=callbacks())]
        for path in save.values():
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*residuals.*|.*holds no state of.*")
                found[name].append(fit(module(), world_size, strategy(**options), path, callbacks=callbacks()))
    return found


def check_resumed(results):
    for found in results:
        for name, (whole, *resumed) in found.items():
            assert whole["residual"].any()
            for number, outcome in enumerate(resumed):
                assert_same(outcome, whole, f"{name}, resumed after step {(2, 4)[number]}:")


def test_a_run_resumes_between_two_thresholds_with_the_same_bits(ranks, tmp_path):
    check_resumed(ranks.run(resume, 2, str(tmp_path), CASES))


def test_a_run_on_nodes_resumes_with_the_same_bits(ranks, tmp_path):
    check_resumed(ranks.run(resume, 4, str(tmp_path), {"nodes": {"ranks_per_node": 2, "density": 0.1}}))


class Classes(Net):
    """As a curvature method wants it: the loss of the layers' output, in the training step."""

    def training_step(self, _, batch_idx):
        x = self.batch(batch_idx)
        return functional.cross_entropy(self.layers(x), x[:, :3].argmax(dim=1))


def preconditioners():
    return [Preconditioner("kfac", damping=0.1, factor_every=1, inverse_every=2, warmup_steps=0)]


def resume_preconditioned(rank, world_size, folder):
    found = resume(rank, world_size, folder, {"kfac": {}}, Classes, preconditioners)
    return {**found, "alone": fit(Classes(), world_size, strategy())}


def test_a_preconditioned_run_resumes_with_the_same_bits(ranks, tmp_path):
    first, second = ranks.run(resume_preconditioned, 2, str(tmp_path))
    assert not torch.equal(first["kfac"][0]["weights"], first.pop("alone")["weights"]), "the gradient was preconditioned"
    second.pop("alone")
    check_resumed([first, second])
    assert_same(first["kfac"][0], second["kfac"][0], "ranks apart", but=("residual",))


class Integers(Net):
    """Has a residual of whole numbers when it is saved."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.save:
            state = self.trainer.strategy.rank_state_dict()
            generator = torch.Generator().manual_seed(self.global_rank)
            for residual in state["residual"].values():
                residual.copy_(torch.randint(-9, 10, residual.shape, generator=generator))
            self.trainer.strategy.load_rank_state_dict(state)
        super().on_train_batch_end(outputs, batch, batch_idx)


def of_nodes(ranks_per_node, world_size):
    return {"ranks_per_node": ranks_per_node, "density": 0.1, "mode": "global" if world_size == 3 else "streamed"}


def save(rank, world_size, folder):
    """Train a step with the residuals above and save; return the residuals by the ranks in a node."""
    found = {}
    for inside in (1, 2) if world_size == 4 else (1,):
        options = of_nodes(inside, world_size)
        module = Integers(save={1: f"{folder}/{world_size}-{inside}.ckpt"})
        found[inside] = fit(module, world_size, strategy(**options), max_steps=1)["residual"]
    return found


def resume_others(rank, world_size, folder, sources):
    """Return what a rank has of each checkpoint: residual at once, and all after two more steps."""
    found = {}
    for ranks, inside in sources:
        path, options = f"{folder}/{ranks}-{inside}.ckpt", of_nodes(inside, ranks)
        at_once = fit(Net(), world_size, strategy(**options), path, max_steps=1)["residual"]
        found[ranks, inside] = at_once, fit(Net(), world_size, strategy(**options), path, max_steps=3)
    return found


def mean(residuals):
    return sum(residual.double() for residual in residuals) / len(residuals)


def test_on_another_number_of_ranks_the_mean_of_what_waits_is_kept(ranks, tmp_path):
    saved = {number: ranks.run(save, number, str(tmp_path)) for number in (2, 3, 4)}
    sources = {2: [(4, 1), (3, 1)], 4: [(2, 1)]}
    for number, of_sources in sources.items():
        results = ranks.run(resume_others, number, str(tmp_path), of_sources)
        for old, inside in of_sources:
            found = mean([of_rank[old, inside][0] for of_rank in results])
            expected = mean([of_rank[inside] for of_rank in saved[old]])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if old == 3 else 0, msg=f"{old} -> {number}")
            for of_rank in results:
                trained = of_rank[old, inside][1]
                assert_same(trained, results[0][old, inside][1], f"{old} -> {number}: ranks apart", but=("residual",))
                assert trained["steps"] == 3


def resume_nodes(rank, world_size, folder):
    other_nodes = refusal(fit, Net(), world_size, strategy(density=0.1), f"{folder}/4-2.ckpt")
    unlike = refusal(fit, Net(), world_size, strategy(ranks_per_node=2, density=0.1), f"{folder}/3-1.ckpt")
    return unlike, other_nodes


def test_nodes_take_over_from_whole_nodes_alone(ranks, tmp_path):
    for number in (3, 4):
        ranks.run(save, number, str(tmp_path))
    for unlike, other_nodes in ranks.run(resume_nodes, 4, str(tmp_path)):
        assert "are of 3 ranks, which are no whole nodes of 2; resume with the ranks_per_node" in unlike
        assert "saved with ranks_per_node=2, and here it is 1, so that each rank holds other parts" in other_nodes


@pytest.mark.slow
def test_nodes_take_over_from_nodes_place_by_place(ranks, tmp_path):
    saved = ranks.run(save, 4, str(tmp_path))
    results = ranks.run(resume_others, 6, str(tmp_path), [(4, 2)])
    for place in (0, 1):
        found = mean([of_rank[4, 2][0] for of_rank in results[place::2]])
        torch.testing.assert_close(found, mean([of_rank[2] for of_rank in saved[place::2]]), rtol=0, atol=1e-6)
    for of_rank in results:
        assert_same(of_rank[4, 2][1], results[0][4, 2][1], "ranks apart", but=("residual",))
