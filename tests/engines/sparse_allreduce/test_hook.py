"""The hook in plain DDP against the paper's step written densely, and its modes against each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce import OkTopkState, merge_rank_states
from tests.engines.sparse_allreduce.hook_parts import (
    DenseOracle,
    batch,
    flat,
    hooked,
    loss_of,
    net,
    residual_of,
    train,
    train_densely,
)

EXACT = {"density": 0.05, "threshold": "exact"}


def exact_runs(rank, world_size, every_options):
    found = []
    for options in every_options:
        module, state = train(rank, world_size, options)
        found.append((flat(module), residual_of(state)))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_and_residuals_are_the_oracles_to_the_bit(ranks, world_size):
    options = [{**EXACT, "mode": "streamed"}, {**EXACT, "mode": "global"}, {**EXACT, "mode": "global", "clip_norm": 0.1}]
    results = ranks.run(exact_runs, world_size, options)
    for number, given in enumerate(options):
        weights, oracle = train_densely(world_size, given["density"], clip_norm=given.get("clip_norm"))
        for rank in range(world_size):
            found, residual = results[rank][number]
            if "clip_norm" in given:  # the norm is added up in another order
                np.testing.assert_allclose(found, weights, rtol=0, atol=1e-6)
            else:
                assert (found == weights).all(), (given, rank)
                assert (residual == oracle.residuals[rank]).all(), (given, rank)


def modes(rank, world_size):
    found = {}
    for threshold in ("servo", "reused"):
        options = {"density": 0.05, "threshold": threshold, "threshold_every": 6}
        for mode in ("global", "streamed"):
            module, state = train(rank, world_size, {**options, "mode": mode}, steps=14)
            found[threshold, mode] = flat(module), residual_of(state), len(state.layout.segments)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_streamed_is_global_to_the_bit_between_exact_thresholds_too(ranks, world_size):
    for found in ranks.run(modes, world_size):
        for threshold in ("servo", "reused"):
            weights, residual, segments = found[threshold, "streamed"]
            assert segments > 1, "nothing could be streamed"
            assert (weights == found[threshold, "global"][0]).all()
            assert (residual == found[threshold, "global"][1]).all()


def growing(rank, world_size):
    """Gradients grow from step to step, so that reused thresholds let far too much through: return what was sent, over k."""
    module = net()
    wrapped, state = hooked(module, {"density": 0.05, "threshold": "reused", "threshold_every": 100})
    found = []
    for step in range(8):
        module.zero_grad()
        (loss_of(wrapped, rank, step) * 3.0**step).backward()
        found.append(state.metrics["selected_over_k"])
        found.append(state.metrics["selected_globally_over_k"])
    return found, len(state.layout.segments), state.metrics["reached_over_k"]


def test_streamed_never_sends_more_than_k(ranks):
    for found, segments, reached in ranks.run(growing, 2):
        assert segments > 1
        assert reached > 2.0
        assert max(found) <= 1.0


class Whole(nn.Module):
    """Gradients are whole numbers, and the weights never move: masses can be added up without rounding."""

    def __init__(self, parts=3):
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleList(nn.Linear(30, 40, bias=False) for _ in range(parts))

    def forward(self, x, used):
        return sum(part(x).mul(number + 1).sum() for number, part in enumerate(self.parts) if number in used)


def whole_batch(rank, step):
    return torch.randint(-9, 10, (4, 30), generator=torch.Generator().manual_seed(100 * step + rank)).float()


def everything(step, rank):
    return (0, 1, 2)


def masses(rank, world_size, options, steps, used_by_step=everything, accumulate=1, dense_from=None, **ddp):
    """Return the largest error of mass after any step, over all ranks, for each element or (on two levels) each parameter."""
    module = Whole()
    wrapped, state = hooked(module, options, **ddp)
    given = torch.zeros(sum(p.numel() for p in module.parameters()))
    taken = torch.zeros_like(given)
    errors = []
    for step in range(steps):
        if step == dense_from:
            state.options = replace(state.options, dense_steps=steps)
        module.zero_grad()
        for part in range(accumulate):
            x = whole_batch(rank, step * accumulate + part)
            used = used_by_step(step, rank)
            alone = torch.autograd.grad(module(x, used), list(module.parameters()), allow_unused=True, materialize_grads=True)
            given += torch.cat([gradient.flatten() for gradient in alone])
            if part < accumulate - 1:
                with wrapped.no_sync():
                    wrapped(x, used).backward()
            else:
                wrapped(x, used).backward()
        for number, parameter in enumerate(module.parameters()):
            if parameter.grad is not None:
                size = parameter.numel()
                taken[number * size : (number + 1) * size] += parameter.grad.flatten() * world_size
        waiting = torch.from_numpy(residual_of(state))
        if options.get("ranks_per_node"):
            sums = [part.view(3, -1).double().sum(dim=1) for part in (given, waiting, taken)]
        else:
            sums = [part.double() for part in (given, waiting, taken)]
        total = torch.stack(sums[:2])
        dist.all_reduce(total)
        errors.append(float((total[0] - total[1] - sums[2]).abs().max()))
    return max(errors)


def one_missing(step, rank):
    """In odd steps no rank uses part 1; in even ones rank 0 alone does without."""
    return (0, 2) if step % 2 or rank == 0 else (0, 1, 2)


def conserved(rank, world_size):
    options = {"density": 0.05, "threshold_every": 5, "repartition_every": 7}
    if world_size == 4:
        return {"two levels": masses(rank, world_size, {**options, "ranks_per_node": 2}, 12)}
    found = {}
    for mode in ("streamed", "global", "per_bucket"):
        found[mode] = masses(rank, world_size, {**options, "mode": mode}, 17)
        unused = {**options, "unused_parameters": True, "mode": mode}
        found[f"unused, {mode}"] = masses(rank, world_size, unused, 14, one_missing, find_unused_parameters=True)
    found["bfloat16"] = masses(rank, world_size, {**options, "values": "bfloat16"}, 17)
    unused = {**options, "unused_parameters": True}
    found["unused, then dense"] = masses(rank, world_size, unused, 10, one_missing, dense_from=6, find_unused_parameters=True)
    found["dense first"] = masses(rank, world_size, {**options, "dense_steps": 3}, 8)
    found["accumulated"] = masses(rank, world_size, options, 8, accumulate=3)
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_mass_is_lost_or_applied_twice(ranks, world_size):
    """Sum of gradients given = sum taken by the optimizer + sum of residuals, after every step, in whole numbers."""
    for found in ranks.run(conserved, world_size):
        assert found == dict.fromkeys(found, 0.0)


def sparse_then_dense(rank, world_size):
    """Return the error of mass over a change from sparse to dense steps, and the norm of what waits afterwards."""
    module = net()
    wrapped, state = hooked(module, {"density": 0.05})
    given = taken = 0.0
    for step in range(6):
        if step == 4:
            state.options = replace(state.options, dense_steps=100)
        module.zero_grad()
        alone = torch.autograd.grad(loss_of(module, rank, step), list(module.parameters()))
        given = given + torch.cat([gradient.flatten() for gradient in alone])
        loss_of(wrapped, rank, step).backward()
        taken = taken + torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    dist.all_reduce(given)
    return float((given / world_size - taken).abs().max()), float(state.residual.abs().max())


def test_a_dense_step_takes_along_what_waits(ranks):
    for error, waiting in ranks.run(sparse_then_dense, 2):
        assert error < 1e-6
        assert waiting == 0.0


def scaled(rank, world_size):
    """The same training with a loss scale that changes, in powers of two: no bit may differ."""
    scales = [1.0, 1024.0, 1024.0, 64.0, 65536.0, 2.0, 2.0, 128.0]
    found = []
    for use in (False, True):
        module = net()
        scale = [1.0]
        wrapped, state = hooked(module, {"density": 0.05, "threshold_every": 3, "loss_scale": lambda scale=scale: scale[0]})
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for step, value in enumerate(scales):
            scale[0] = value if use else 1.0
            optimizer.zero_grad()
            (loss_of(wrapped, rank, step) * scale[0]).backward()
            for parameter in module.parameters():
                parameter.grad.div_(scale[0])
            optimizer.step()
        found.append((flat(module), residual_of(state)))
    return found


def test_residuals_are_kept_without_the_loss_scale(ranks):
    for plain, with_scale in ranks.run(scaled, 2):
        assert (plain[0] == with_scale[0]).all()
        assert (plain[1] == with_scale[1]).all()


def spoiled(rank, world_size, mode):
    """Rank 1 has NaN in the gradient of the first layer, which comes last, in one step; return what the step changed."""
    module = net()
    wrapped, state = hooked(module, {"density": 0.05, "mode": mode, "threshold_every": 4})
    before = None
    for step in range(7):
        module.zero_grad()
        loss = loss_of(wrapped, rank, step)
        if step == 5:
            before = residual_of(state), [core.state_dict() for core in state.cores], state.steps
            if rank == 1:
                loss = loss + (module[0].weight * torch.tensor(float("nan"))).sum()
        loss.backward()
        if step == 5:
            after = residual_of(state), [core.state_dict() for core in state.cores], state.steps
            bad = all(bool(parameter.grad.isnan().all()) for parameter in module.parameters())
            skipped = state.skipped, state.skipped_count
    finite = all(bool(parameter.grad.isfinite().all()) for parameter in module.parameters())
    same = (before[0] == after[0]).all() and before[2] == after[2]
    thresholds = [
        (old["local_threshold"], old["step"]) == (new["local_threshold"], new["step"])
        for old, new in zip(*(before[1], after[1]), strict=True)
    ]
    return bool(same), all(thresholds), bad, skipped, finite, state.skipped


def spoiled_in_all_modes(rank, world_size):
    return [spoiled(rank, world_size, mode) for mode in ("streamed", "global", "per_bucket")]


def test_a_gradient_that_is_not_finite_leaves_the_step_out_on_all_ranks(ranks):
    for found in ranks.run(spoiled_in_all_modes, 2):
        assert found == [(True, True, True, (True, 1), True, False)] * 3


def joined(rank, world_size):
    """Rank 1 has fewer batches; return weights, and the error of mass with the residual that is left."""
    from torch.distributed.algorithms.join import Join

    module = net()
    wrapped, state = hooked(module, {"density": 0.05, "threshold_every": 3})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with Join([wrapped]):
        for step in range(9 if rank == 0 else 5):
            optimizer.zero_grad()
            loss_of(wrapped, rank, step).backward()
            optimizer.step()
    return flat(module), state.steps


def test_ranks_that_have_finished_join_the_others(ranks):
    (first, steps), (second, other_steps) = ranks.run(joined, 2)
    assert steps == other_steps == 9
    assert (first == second).all()


def two_levels(rank, world_size):
    """Two nodes of two ranks, exact thresholds: return weights."""
    module, state = train(rank, world_size, {**EXACT, "ranks_per_node": 2, "mode": "global"})
    return flat(module), state.k


def test_two_levels_add_up_inside_nodes_and_select_between_them(ranks):
    """Oracle: for each chunk the two nodes' sums go through the dense oracle, with k of a chunk."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    sizes = [parameter.numel() for parameter in module.parameters()]
    chunks = [-(-size // 2) for size in sizes]
    results = ranks.run(two_levels, 4)
    oracles = [DenseOracle(2, sum(chunks), results[0][1]) for _ in range(2)]
    for step in range(10):
        nodes = []
        for node in range(2):
            total = None
            for rank in (2 * node, 2 * node + 1):
                optimizer.zero_grad()
                loss_of(module, rank, step).backward()
                gradients = [parameter.grad.flatten().numpy().copy() for parameter in module.parameters()]
                total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
            nodes.append([np.pad(part, (0, 2 * chunk - len(part))) for part, chunk in zip(total, chunks, strict=True)])
        updates = []
        for place in range(2):
            vectors = [
                np.concatenate([p[place * c : (place + 1) * c] for p, c in zip(node, chunks, strict=True)]) for node in nodes
            ]
            updates.append(np.split(oracles[place].step(vectors) / np.float32(4), np.cumsum(chunks)[:-1]))
        for number, parameter in enumerate(module.parameters()):
            whole = np.concatenate([updates[0][number], updates[1][number]])[: sizes[number]]
            parameter.grad = torch.from_numpy(whole).view_as(parameter)
        optimizer.step()
    for weights, _ in results:
        np.testing.assert_array_equal(weights, flat(module))


def test_merged_residuals_keep_their_mean():
    generator = torch.Generator().manual_seed(0)
    states = [
        {
            "shapes": {"w": [8]},
            "ranks": 4,
            "rank": rank,
            "cores": [1],
            "residual": {"w": torch.randint(-99, 99, (8,), generator=generator).float()},
        }
        for rank in range(4)
    ]
    total = sum(state["residual"]["w"] for state in states) / 4
    for ranks in (1, 2, 8):
        merged = [merge_rank_states(states, rank, ranks) for rank in range(ranks)]
        assert torch.equal(sum(state["residual"]["w"] for state in merged) / ranks, total)
        assert all(state["cores"] == [] and state["ranks"] == ranks for state in merged)


def resumed(rank, world_size):
    """Stop after seven steps, go on in a new state, and return both ends."""
    ends = []
    for stop in (None, 7):
        module = net()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        options = {"density": 0.05, "threshold_every": 4, "values": "bfloat16"}
        wrapped, state = hooked(module, options)
        for step in range(12):
            if step == stop:
                saved, weights = state.rank_state_dict(), module.state_dict()
                state.close()
                module = net()
                module.load_state_dict(weights)
                kept = optimizer.state_dict()
                optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
                optimizer.load_state_dict(kept)
                wrapped, state = hooked(module, options)
                state.load_rank_state_dict(saved)
            optimizer.zero_grad()
            loss_of(wrapped, rank, step).backward()
            optimizer.step()
        ends.append((flat(module), residual_of(state)))
    return ends


def test_a_state_goes_on_with_the_same_bits_though_buckets_come_otherwise(ranks):
    for whole, again in ranks.run(resumed, 2):
        assert (whole[0] == again[0]).all()
        assert (whole[1] == again[1]).all()


def refusals(rank, world_size):
    said = []
    calls = [
        lambda: OkTopkState(net(), density=0.0001),
        lambda: OkTopkState(net(), density=1.5),
        lambda: OkTopkState(nn.Embedding(9, 9, sparse=True), density=0.5),
        lambda: OkTopkState(net(), density=0.5, ranks_per_node=3),
        lambda: OkTopkState(net(), mode="stream"),
        lambda: OkTopkState(net(), clip_norm=1.0),
        lambda: OkTopkState(net(), threshold="sampled"),
        lambda: OkTopkState(net().requires_grad_(False)),
        lambda: OkTopkState(net()).take((batch(0, 0), None)),
        lambda: OkTopkState(net()).load_rank_state_dict(OkTopkState(nn.Linear(20, 40)).rank_state_dict()),
    ]
    for call in calls:
        with pytest.raises(InputError) as refused:
            call()
        said.append(str(refused.value))
    return said


def test_what_cannot_work_is_refused_in_a_sentence(ranks):
    parts = [
        "fewer than the 2 ranks",
        "density must be in (0, 1], got 1.5",
        "sparse=False",
        "ranks_per_node must divide",
        "did you mean streamed",
    ]
    parts += [
        "use mode='global'",
        "threshold='servo'",
        "nothing to reduce",
        "compiled autograd",
        "parameter 0.weight is missing in it",
    ]
    for said in ranks.run(refusals, 2):
        for sentence, part in zip(said, parts, strict=True):
            assert part in sentence
