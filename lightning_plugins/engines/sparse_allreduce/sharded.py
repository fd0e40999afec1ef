"""Ok-Topk between nodes for FSDP2: shards are reduced densely inside a node, and sparsely between nodes.

FSDP2 reduce-scatters the gradients of a wrapped module inside its mesh, and then calls a hook with this rank's shard, in the
order of the backward pass. If the mesh spans one node, what is left is the sum over nodes: here sparse, with a residual for each
wrapped module. A shard's thresholds are its own, since the others' gradients are not there yet; and whether it is finite is known
to the ranks that hold it alone, when others have been sent already.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce.allreduce import sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.exchange import Traffic
from lightning_plugins.engines.sparse_allreduce.settings import check_density
from lightning_plugins.engines.sparse_allreduce.state import SparseAllreduceState


class ShardedOkTopk:
    """Residuals and thresholds of all FSDP2 modules of a model, by their names.

    Args:
        module: wrapped with ``fully_shard`` over a mesh that spans one node.
        group: ranks that hold the same shard, one of each node.
        density: share of each shard that is sent, in (0, 1].
        settings: of `SparseAllreduceState`.

    Raises:
        InputError: for a density out of range, or a module that FSDP2 does not shard or whose mesh spans the group already.

    Attributes:
        skipped_count: shards of this rank whose gradient was not finite: they came out NaN on all ranks that hold them, and
            their residuals stayed as they were. Where the optimizer's step is left out then, on all ranks, as gradient scalers
            do, `take_back` returns what other shards have sent for nothing.
        traffic: bytes and seconds by phase between nodes.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, density: float = 0.01, **settings: Any) -> None:
        from torch.distributed.fsdp import FSDPModule

        check_density(density)
        self.group, self.density, self.ranks = group, density, dist.get_world_size(group)
        self.skipped_count = 0
        self.traffic = Traffic()
        self.states: dict[str, SparseAllreduceState] = {}
        self.residuals: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor | None, dict[str, Any]]] = {}
        wrapped = {name: part for name, part in module.named_modules() if isinstance(part, FSDPModule)}
        if not wrapped:
            raise InputError("the module has no part that fully_shard has wrapped; wrap it over a mesh of one node first")
        self._check_meshes(module)
        for name, part in wrapped.items():
            self.states[name] = SparseAllreduceState(**settings)
            self.states[name].traffic = self.traffic
            part.set_all_reduce_hook(self._hook_of(name))

    def take_back(self) -> None:
        """Undo what the last backward pass did to residuals and thresholds, for its step is left out; call it on all ranks."""
        for name, (residual, state) in self._before.items():
            self.states[name].load_state_dict(state)
            if residual is None:
                self.residuals.pop(name, None)
            else:
                self.residuals[name] = residual
        self._before.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return residuals and thresholds of this rank: tensors and plain values."""
        return {
            "ranks": self.ranks,
            "residuals": {name: residual.cpu().clone() for name, residual in self.residuals.items()},
            "states": {name: state.state_dict() for name, state in self.states.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken on this rank.

        Raises:
            InputError: if it is of another model or another number of nodes.
        """
        if state["ranks"] != self.ranks or state["states"].keys() != self.states.keys():
            raise InputError(
                f"the state is of {state['ranks']} nodes and the modules {', '.join(map(repr, state['states']))}; here are "
                f"{self.ranks} nodes and {', '.join(map(repr, self.states))}"
            )
        self.residuals = {name: residual.clone() for name, residual in state["residuals"].items()}
        for name, of_module in state["states"].items():
            self.states[name].load_state_dict(of_module)

    def _check_meshes(self, module: nn.Module) -> None:
        from torch.distributed.tensor import DTensor

        others = set(dist.get_process_group_ranks(self.group)) - {dist.get_rank()}
        for name, parameter in module.named_parameters():
            mesh = parameter.device_mesh.mesh.flatten().tolist() if isinstance(parameter, DTensor) else []
            if not others.isdisjoint(mesh):
                raise InputError(
                    f"{name} is reduced over the ranks {mesh} already, and the group has {sorted(others & set(mesh))} of them; "
                    "wrap over a mesh of one node, and give the group of ranks that hold the same shard in all nodes"
                )

    def _hook_of(self, name: str) -> Callable[[Tensor], None]:
        def reduce(shard: Tensor) -> None:
            residual = self.residuals.get(name)
            if residual is not None and residual.shape != shard.shape:
                raise InputError(
                    f"the residual of {name!r} has {len(residual)} elements, its shard {len(shard)}; load the state of this model"
                )
            gradient = shard.to(torch.promote_types(shard.dtype, torch.float32))
            acc = gradient.clone() if residual is None else gradient + residual.to(shard.device)
            k = max(round(self.density * len(acc)), self.ranks)
            self._before[name] = residual, self.states[name].state_dict()
            try:
                total = sparse_allreduce(acc, k, state=self.states[name], group=self.group)
            except FloatingPointError:
                self.skipped_count += 1
                shard.fill_(float("nan"))
                return
            self.residuals[name] = acc
            shard.copy_(total / self.ranks)

        return reduce
