"""States of which ranks hold pieces: whole again for torch's reader on any number of ranks, and in one ordinary checkpoint."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.disk import read_step, write_step
from lightning_plugins.engines.resilience.disk_checkpoint import read_checkpoint
from lightning_plugins.engines.resilience.state_tree import pack
from lightning_plugins.engines.resilience.tensor_pieces import take_apart
from tests.engines.resilience.keeper_parts import assert_same

MESH = {"mesh_dim_names": ("data_parallel", "tensor_parallel")}
PLACEMENTS = {
    "rows": (Shard(0), Replicate()),
    "columns": (Replicate(), Shard(1)),
    "both": (Shard(0), Shard(1)),
    "everywhere": (Replicate(), Replicate()),
    "one row": (Shard(0), Replicate()),
    "scale": (Replicate(), Replicate()),
}


def whole(name):
    if name == "scale":
        return torch.tensor(0.25)
    rows = 1 if name == "one row" else 7
    return torch.arange(rows * 5, dtype=torch.float64).reshape(rows, 5) + 100 * list(PLACEMENTS).index(name)


def capture(rank, world_size, shape):
    mesh = init_device_mesh("cpu", shape, **MESH)
    tensors = {name: distribute_tensor(whole(name), mesh, places) for name, places in PLACEMENTS.items()}
    moments = {"exp_avg": -tensors["both"], "step": torch.tensor(3.0)}
    optimizer = {"state": {4: moments}, "param_groups": [{"lr": 0.1, "params": [4]}]}
    logged = {"norms": [tensors["everywhere"].norm()]}
    weights = {**tensors, "buffer": torch.tensor(rank)}
    return take_apart({"state_dict": weights, "optimizer_states": [optimizer], "epoch": 2, "logged": logged})


def refuse(rank, world_size):
    """Log a number of which each rank has a part."""
    rows = distribute_tensor(whole("rows"), init_device_mesh("cpu", (world_size,)), [Shard(0)])
    with pytest.raises(InputError, match=r"logged / norm: a value of type .*DTensor is a tensor subclass.* its full_tensor\(\)"):
        pack(take_apart({"state_dict": {}, "optimizer_states": [], "logged": {"norm": rows.norm()}}))


def load_elsewhere(rank, world_size, path):
    """Read onto another number of ranks with torch alone; return whether every number is where it was."""
    mesh = init_device_mesh("cpu", (world_size,))
    zeros = {name: torch.zeros_like(whole(name)) for name in PLACEMENTS}
    state = {name: distribute_tensor(zero, mesh, [Shard(0) if zero.dim() else Replicate()]) for name, zero in zeros.items()}
    buffer = torch.tensor(-1)
    moment = distribute_tensor(torch.zeros(7, 5, dtype=torch.float64), mesh, [Shard(1)])
    wanted = {"state_dict": {**state, "buffer": buffer}, "optimizer_states": [{"state": {"4": {"exp_avg": moment}}}]}
    dcp.load(wanted, checkpoint_id=path)
    dist.barrier()
    return [bool((value.full_tensor() == whole(name)).all()) for name, value in state.items()] + [
        bool((moment.full_tensor() == -whole("both")).all()),
        int(buffer) == 0,
    ]


def test_parts_elsewhere_are_refused_by_name(ranks):
    ranks.run(refuse, 2)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), (2, 2)], ids=str)
def test_pieces_are_whole_again(ranks, tmp_path, shape):
    states = ranks.run(capture, shape[0] * shape[1], shape)
    assert not any(isinstance(value, DTensor) for state in states for value in state["state_dict"].values())
    if shape == (3, 1):
        assert [len(state["state_dict"]["rows"]) for state in states] == [3, 3, 1]
    shared = {"state_dict": {}, "optimizer_states": [{}]}
    shards = {f"rank{rank}": state for rank, state in reversed([*enumerate(states)])}  # ranks without a row come first
    path = write_step(tmp_path, 5, {"shared": shared, **shards}, {})
    assert_same(read_step(path, "rank0"), states[0])
    assert ranks.run(load_elsewhere, 2, str(path)) == [[True] * (len(PLACEMENTS) + 2)] * 2
    for rank, state in enumerate(states):
        found = read_checkpoint(path, rank)
        assert found["state_dict"].keys() == {*PLACEMENTS, "buffer"}
        for name in PLACEMENTS:
            assert_same(found["state_dict"][name], whole(name))
        assert_same(found["state_dict"]["buffer"], torch.tensor(rank))
        assert_same(found["optimizer_states"][0]["state"][4]["exp_avg"], -whole("both"))
        assert found["optimizer_states"][0]["param_groups"] == state["optimizer_states"][0]["param_groups"]
        assert found["logged"]["norms"][0].item() == pytest.approx(whole("everywhere").norm().item())
        assert found.keys() == {"state_dict", "optimizer_states", "epoch", "logged"}
