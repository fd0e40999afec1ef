"""The hook where a rank sees a part alone: chunks of a node, its own norm, layers that a pass leaves out, one segment."""

import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce import step
from lightning_plugins.engines.sparse_allreduce.advice import Advice
from lightning_plugins.engines.sparse_allreduce.hook_options import HookOptions
from lightning_plugins.engines.sparse_allreduce.rank_state import check_fits
from tests.engines.sparse_allreduce.hook_parts import flat, hooked, loss_of, net, residual_of, train

NODES = {"density": 0.05, "ranks_per_node": 2}


def one_bad_element(rank, world_size, every_options):
    """Rank 1 has NaN in one element of the first layer, in step 3; return what the step changed, by options."""
    found = []
    for options in every_options:
        module = net()
        wrapped, state = hooked(module, {**NODES, "threshold_every": 4, **options})
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for number in range(6):
            optimizer.zero_grad()
            loss = loss_of(wrapped, rank, number)
            if number == 3:
                before = residual_of(state), state.steps
                if rank == 1:
                    loss = loss + module[0].weight[0, 0] * float("nan")
            loss.backward()
            if number == 3:
                same = (residual_of(state) == before[0]).all() and state.steps == before[1]
                bad = all(bool(parameter.grad.isnan().all()) for parameter in module.parameters())
                skipped = bool(same), bad, state.skipped, state.skipped_count
            else:
                optimizer.step()
        found.append((skipped, bool(np.isfinite(flat(module)).all()), state.steps))
    return found


def test_one_bad_element_leaves_the_step_out_on_ranks_that_never_see_it(ranks):
    """Each rank of a node looks at its own chunks alone."""
    options = [{}, {"mode": "global"}, {"mode": "per_bucket"}, {"dense_steps": 5}]
    for found in ranks.run(one_bad_element, 4, options):
        assert found == [((True, True, True, 1), True, 5)] * len(options)


def advised(rank, world_size):
    """Ranks of the first place have measured slow dense steps, the others fast ones; return what each does."""
    decide = Advice._decide

    def measured_otherwise(self, state):
        self._dense_s[:] = [1e-6 if rank % 2 else 10.0]
        decide(self, state)

    Advice._decide = measured_otherwise
    _, state = train(rank, world_size, {**NODES, "auto": True}, steps=13)
    return state.advice.sparse, state.advice.gain, state.metrics["predicted_gain"], state.advice.sentence


def test_all_ranks_take_the_same_advice(ranks):
    results = ranks.run(advised, 4)
    assert all(found == results[0] for found in results)
    sparse, gain, logged, sentence = results[0]
    assert sparse is True
    assert gain == logged > 1.1
    assert f"a gain of {gain:.2f}x: going on sparsely" in sentence


def clipped(rank, world_size, every_options):
    """Return the mean that the hook makes of one pass, in which rank 1's loss is 100 times as large, and each rank's gradient."""
    module = net()
    (loss_of(module, rank, 0) * (100.0 if rank == 1 else 1.0)).backward()
    own = np.concatenate([parameter.grad.flatten().numpy() for parameter in module.parameters()])
    found = []
    for options in every_options:
        module = net()
        wrapped, _ = hooked(module, {"clip_norm": 1.0, "mode": "global", **options})
        (loss_of(wrapped, rank, 0) * (100.0 if rank == 1 else 1.0)).backward()
        found.append(np.concatenate([parameter.grad.flatten().numpy() for parameter in module.parameters()]))
    return own, found


def test_every_rank_clips_its_own_gradient(ranks):
    """On one level and on two, in dense steps too. Oracle: the mean of the clipped gradients, of which everything is sent."""
    options = [
        {"density": 1.0},
        {"density": 1.0, "ranks_per_node": 2},
        {"dense_steps": 9},
        {"dense_steps": 9, "ranks_per_node": 2},
    ]
    results = ranks.run(clipped, 4, options)
    limit = 1.0 / np.sqrt(4)
    gradients = [own.astype(np.float64) for own, _ in results]
    assert [np.linalg.norm(own) > limit for own in gradients] == [True] * 4
    expected = sum(own * limit / np.linalg.norm(own) for own in gradients) / 4
    for _, found in results:
        for mean in found:
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-8)


class Branches(nn.Module):
    """Of two layers a pass uses the named one alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({"a": nn.Linear(20, 5), "b": nn.Linear(20, 5)})

    def forward(self, x, name):
        return self.layers[name](x).square().mean()


def two_passes(rank, world_size):
    """Return both layers' gradients after a pass through each, with everything sent, by ``gradient_as_bucket_view``."""
    found = []
    for view in (False, True):
        module = Branches()
        options = {"density": 1.0, "threshold": "exact", "unused_parameters": True}
        wrapped, state = hooked(module, options, find_unused_parameters=True, gradient_as_bucket_view=view)
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(rank))
        for name in ("a", "b"):
            wrapped(x, name).backward()
        found.append([module.layers[name].weight.grad.clone() for name in ("a", "b")])
        assert not state.residual.any()
    return found


def test_gradients_of_an_earlier_pass_stay_where_they_are_the_buckets_themselves(ranks):
    for plain, view in ranks.run(two_passes, 2):
        for name in (0, 1):
            assert plain[name].any()
            assert torch.equal(view[name], plain[name])


def ignored(rank, world_size):
    module = net()
    name = "2.weight"
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [name])
    wrapped, state = hooked(module, {"density": 0.05})
    for number in range(4):
        loss_of(wrapped, rank, number).backward()
    return name in state.shapes, state.steps


def test_parameters_that_ddp_ignores_are_left_to_the_user(ranks):
    assert ranks.run(ignored, 2) == [(False, 4)] * 2


def opened_and_closed(rank, world_size):
    """Return the threads that states leave behind, and their groups."""
    counts = []
    for _ in range(4):
        module = net()
        wrapped, state = hooked(module, {"density": 0.05})
        loss_of(wrapped, rank, 0).backward()
        dist.barrier()
        state.close()
        del wrapped, state
        counts.append((threading.active_count(), len(dist.distributed_c10d._world.pg_map)))
    return counts


def test_a_closed_state_leaves_no_group_behind(ranks):
    for counts in ranks.run(opened_and_closed, 2):
        assert counts == counts[:1] * 4


def busiest(rank, world_size):
    """Return what the report of a step with exact thresholds says of the busiest ranks, and that added up from every segment."""
    selected = []
    reduce = step.split_and_reduce
    step.split_and_reduce = lambda indices, *rest: (selected.append(len(indices)), reduce(indices, *rest))[1]
    module = net()
    wrapped, state = hooked(module, {"density": 0.05, "threshold": "exact"})
    for number in range(4):
        selected.clear()
        loss_of(wrapped, rank, number).backward()
    counts = torch.tensor(selected)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return state.cores[0].report.most_selected, int(counts.sum()), len(selected)


def test_the_busiest_rank_is_counted_in_every_segment(ranks):
    for reported, expected, segments in ranks.run(busiest, 2):
        assert segments > 1
        assert reported == expected > 0


def test_a_state_of_other_nodes_names_them():
    state = {"shapes": {"w": [3]}, "ranks": 4, "ranks_per_node": 1}
    with pytest.raises(InputError, match=r"saved with ranks_per_node=1, and here it is 2.*give ranks_per_node=1"):
        check_fits(state, {"w": [3]}, 2, 2)
    with pytest.raises(InputError, match="the state is of 4 ranks, and there are 6; merge_rank_states"):
        check_fits(state, {"w": [3]}, 6, 1)


def test_a_vector_that_positions_cannot_count_is_refused():
    with pytest.raises(InputError, match="reduces 5000000000 parameters, the most is 4294967296; give ranks_per_node"):
        HookOptions().elements_sent(5_000_000_000, 4)
