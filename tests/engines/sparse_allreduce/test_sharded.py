"""ShardedOkTopk on two nodes of two ranks. Oracle: one process with all gradients, whose shards are cut and selected in numpy."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce import ShardedOkTopk

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="FSDP2 of torch 2.6 wants a GPU: its streams record events"
)

INSIDE = BETWEEN = 2
DENSITY = 0.2
STEPS = 5
RATE = 0.5


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()  # 7 rows: the second shard is padded


def loss(module, step, rank):
    return module(torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + rank))).exp().mean()


class Sharded:
    """A model whose first layer is wrapped by itself, and the rest together."""

    def __init__(self, **settings):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.set_num_threads(1)
        self.mesh = init_device_mesh("cpu", (BETWEEN, INSIDE), mesh_dim_names=("between", "inside"))
        self.module = model()
        fully_shard(self.module[0], mesh=self.mesh["inside"])
        fully_shard(self.module, mesh=self.mesh["inside"])
        self.ok_topk = ShardedOkTopk(self.module, self.mesh.get_group("between"), DENSITY, **settings)

    def train(self, steps, bad=()):
        for step in steps:
            self.module.zero_grad()
            value = loss(self.module, step, dist.get_rank())
            (value * float("nan") if (step, dist.get_rank()) in bad else value).backward()
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter -= RATE * parameter.grad

    def weights(self):
        return [parameter.full_tensor().detach() for parameter in self.module.parameters()]

    def gradients(self):
        return [parameter.grad.full_tensor() for parameter in self.module.parameters()]


def shard_of(gradients, place):
    """Cut rank ``place``'s rows out of every gradient, zeros where there are none, and lay them end to end."""
    parts = []
    for gradient in gradients:
        rows = math.ceil(len(gradient) / INSIDE)
        padded = np.zeros((rows * INSIDE, *gradient.shape[1:]))
        padded[: len(gradient)] = gradient
        parts.append(padded[rows * place : rows * (place + 1)].ravel())
    return np.concatenate(parts)


def whole_of(shards, like):
    """Undo `shard_of` for the shards of all places."""
    wholes, start = [], 0
    for gradient in like:
        rows = math.ceil(len(gradient) / INSIDE)
        size = rows * math.prod(gradient.shape[1:])
        padded = np.concatenate([shard[start : start + size].reshape(rows, *gradient.shape[1:]) for shard in shards])
        wholes.append(padded[: len(gradient)])
        start += size
    return wholes


def top(values, k):
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-np.abs(values), kind="stable")[:k]] = True
    return chosen & (values != 0)


def reduce(shards, residuals):
    """Return the mean over nodes of a place's shards, and change their residuals."""
    k = max(round(DENSITY * len(shards[0])), BETWEEN)
    accumulated = [residual + shard for residual, shard in zip(residuals, shards, strict=True)]
    sent = [top(values, k) for values in accumulated]
    total = sum(np.where(mask, values, 0) for mask, values in zip(sent, accumulated, strict=True))
    final = top(total, k)
    for residual, values, mask in zip(residuals, accumulated, sent, strict=True):
        residual[:] = np.where(mask & final, 0, values)
    return np.where(final, total, 0) / BETWEEN


def oracle():
    """Return weights after all steps, and residuals by module, node and place."""
    module = model()
    groups = {"0": list(module[0].parameters()), "": list(module[2].parameters())}
    residuals = {
        name: [
            [np.zeros_like(shard_of([p.detach().numpy() for p in of_group], place)) for place in range(INSIDE)] for _ in range(2)
        ]
        for name, of_group in groups.items()
    }
    for step in range(STEPS):
        by_rank = []
        for rank in range(INSIDE * BETWEEN):
            module.zero_grad()
            loss(module, step, rank).backward()
            by_rank.append({name: [p.grad.numpy().copy() for p in of_group] for name, of_group in groups.items()})
        for name, of_group in groups.items():
            of_nodes = [
                [
                    np.mean([by_rank[node * INSIDE + i][name][number] for i in range(INSIDE)], axis=0)
                    for number in range(len(of_group))
                ]
                for node in range(BETWEEN)
            ]
            reduced = [
                reduce([shard_of(grads, place) for grads in of_nodes], [residuals[name][node][place] for node in range(BETWEEN)])
                for place in range(INSIDE)
            ]
            for parameter, gradient in zip(of_group, whole_of(reduced, of_nodes[0]), strict=True):
                parameter.data -= RATE * torch.from_numpy(gradient)
    return [p.detach() for p in module.parameters()], residuals


def train(rank, world_size):
    sharded = Sharded(threshold="exact")
    sharded.train(range(STEPS))
    return sharded.weights(), sharded.ok_topk.state_dict()["residuals"], sharded.ok_topk.traffic.total_bytes()


def test_shards_are_reduced_as_a_single_process_does(ranks):
    weights, residuals = oracle()
    for rank, (found, of_rank, (sent_bytes, received_bytes)) in enumerate(ranks.run(train, INSIDE * BETWEEN)):
        for parameter, expected in zip(found, weights, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-12)
        assert of_rank.keys() == residuals.keys()
        for name, residual in of_rank.items():
            expected = residuals[name][rank // INSIDE][rank % INSIDE]
            assert expected.any()
            torch.testing.assert_close(residual, torch.from_numpy(expected), rtol=0, atol=1e-12)
        assert sent_bytes > 0
        assert received_bytes > 0


def resume_and_leave_out(rank, world_size, folder):
    whole = Sharded(threshold_every=3)
    whole.train(range(4))
    file = f"{folder}/{rank}.pt"
    local = [parameter.to_local().detach().clone() for parameter in whole.module.parameters()]
    torch.save(whole.ok_topk.state_dict(), file)
    whole.train(range(4, 6))

    resumed = Sharded(threshold_every=3)
    with torch.no_grad():
        for parameter, value in zip(resumed.module.parameters(), local, strict=True):
            parameter.to_local().copy_(value)
    resumed.ok_topk.load_state_dict(torch.load(file, weights_only=True))
    resumed.train(range(4, 6))
    same = all(torch.equal(a, b) for a, b in zip(whole.weights(), resumed.weights(), strict=True))

    before = copy.deepcopy(resumed.ok_topk.state_dict())
    resumed.train([6], bad={(6, 3)})
    after = resumed.ok_topk.state_dict()
    untouched = all(torch.equal(after["residuals"][name], residual) for name, residual in before["residuals"].items())
    poisoned = all(bool(gradient.isnan().all()) for gradient in resumed.gradients())
    return same, untouched, after["states"] == before["states"], poisoned, resumed.ok_topk.skipped_count


def test_it_goes_on_with_the_same_bits_and_leaves_out_what_is_not_finite(ranks, tmp_path):
    for found in ranks.run(resume_and_leave_out, INSIDE * BETWEEN, str(tmp_path)):
        assert found == (True, True, True, True, 2), "same bits, residuals and thresholds untouched, NaN everywhere, two modules"


def take_back(rank, world_size):
    """A row of rank 3's second layer is NaN: other shards do not know of it, and send; return what is different afterwards."""
    sharded = Sharded(threshold_every=3)
    sharded.train(range(4))
    before = copy.deepcopy(sharded.ok_topk.state_dict())
    sharded.module.zero_grad()
    value = loss(sharded.module, 4, rank)
    out = sharded.module(torch.ones(1, 6, dtype=torch.float64))
    (value + out[0, 0] * (float("nan") if rank == 3 else 0.0)).backward()
    norm = nn.utils.clip_grad_norm_(sharded.module.parameters(), 1.0)
    sent = any(not torch.equal(sharded.ok_topk.residuals[name], kept) for name, kept in before["residuals"].items())
    sharded.ok_topk.take_back()
    after = sharded.ok_topk.state_dict()
    same = all(torch.equal(after["residuals"][name], kept) for name, kept in before["residuals"].items())
    return sent, same, after["states"] == before["states"], bool(norm.full_tensor().isfinite())


def test_what_was_sent_for_a_step_that_is_left_out_can_be_taken_back(ranks):
    results = ranks.run(take_back, INSIDE * BETWEEN)
    assert any(sent for sent, *_ in results)
    assert [rest for _, *rest in results] == [[True, True, False]] * 4, "and a gradient norm tells every rank to leave it out"


def refuse(rank, world_size):
    sharded = Sharded()
    between, inside = sharded.mesh.get_group("between"), sharded.mesh.get_group("inside")
    state = sharded.ok_topk.state_dict()
    sharded.ok_topk.residuals["0"] = torch.zeros(3, dtype=torch.float64)
    sentences = []
    for call in (
        lambda: ShardedOkTopk(sharded.module, between, 2.0),
        lambda: ShardedOkTopk(sharded.module, between, threshold="exakt"),
        lambda: ShardedOkTopk(model(), between),
        lambda: ShardedOkTopk(sharded.module, inside),
        lambda: sharded.ok_topk.load_state_dict({**state, "ranks": 3}),
        lambda: sharded.ok_topk.load_state_dict({**state, "states": {"other": {}}}),
        lambda: sharded.train([0]),
    ):
        with pytest.raises(InputError) as raised:
            call()
        sentences.append(str(raised.value))
    return sentences


def test_what_cannot_be_is_refused(ranks):
    for sentences in ranks.run(refuse, INSIDE * BETWEEN):
        for said, part in zip(
            sentences,
            (
                "density must be in (0, 1], got 2.0",
                "no threshold='exakt'",
                "no part that fully_shard has wrapped; wrap it over a mesh of one node first",
                "0.weight is reduced over the ranks",
                "the state is of 3 nodes and the modules '', '0'; here are 2 nodes",
                "the modules 'other'; here are 2 nodes and '', '0'",
                "the residual of '0' has 3 elements, its shard 28; load the state of this model",
            ),
            strict=True,
        ):
            assert part in said
