"""Ok-Topk in plain DDP: ``ddp.register_comm_hook(OkTopkState(ddp), ok_topk_hook)``, on CPU and GPU.

DDP hands over buckets of gradients, one after the other while backward runs. A worker thread adds each to its residual and, as
far as the mode allows, sends it at once; when the last bucket is through, all residuals are cleared of what was sent and all
futures get their part of the mean. If any rank's gradient is not finite, no residual changes, and every rank gets NaN, which a
gradient scaler takes for what it is.

Difference from the paper: the hook reduces gradients, and the optimizer applies learning rate, momentum and decay afterwards,
as in the paper's code; its algorithm 2 folds the learning rate in.
"""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce._seams import timeout_of
from lightning_plugins.engines.sparse_allreduce.advice import Advice
from lightning_plugins.engines.sparse_allreduce.agreement import FINE, agree
from lightning_plugins.engines.sparse_allreduce.backward_pass import Arrived, BackwardPass
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange, Traffic
from lightning_plugins.engines.sparse_allreduce.hook_options import HookOptions
from lightning_plugins.engines.sparse_allreduce.layout import Layout
from lightning_plugins.engines.sparse_allreduce.nodes import Nodes
from lightning_plugins.engines.sparse_allreduce.rank_state import check_fits
from lightning_plugins.engines.sparse_allreduce.reduction import Routing
from lightning_plugins.engines.sparse_allreduce.state import SparseAllreduceState
from lightning_plugins.engines.sparse_allreduce.worker import Worker


def ok_topk_hook(state: "OkTopkState", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduce a bucket of DDP sparsely; see `OkTopkState`.

    Args:
        state: made with the module that DDP wraps, on every rank.
        bucket: of gradients.
    """
    return state.take(bucket)


class OkTopkState:
    """Residuals, thresholds and counters of a module's gradients, by the names of its parameters.

    Args:
        module: that is trained; DDP's wrapper is taken off.
        density: share of the gradient that is sent, in (0, 1].
        mode: ``streamed``, ``global`` or ``per_bucket``.
        dense_steps: steps at the start that reduce the whole gradient.
        ranks_per_node: above 1, ranks of a node, side by side in the group, reduce densely among themselves.
        clip_norm: each rank clips its gradient to ``clip_norm / sqrt(ranks)`` before it is added to the residual.
        unused_parameters: whether backward passes may leave parameters out.
        auto: time the first steps, dense ones and sparse ones, and stay dense if these are not 1.1 times as fast.
        measure_every: steps between two measurements of norms; 0 for none.
        assumption_every: steps between two measurements of the paper's assumption; 0 for none.
        group: the ranks; the default group if left out.
        timeout: how long to wait for a silent rank; as long as ``group`` does if left out.
        loss_scale: returns what the loss was multiplied with; residuals are kept without it.
        settings: of `SparseAllreduceState`: ``threshold``, ``threshold_every``, ``repartition_every``, ``cuts``, ``owners``,
            ``indices``, ``values``.

    Raises:
        InputError: for a value out of range, options that do not go together, or parameters that the hook cannot reduce.

    Attributes:
        skipped: whether the last step was left out, since a gradient was not finite.
        skipped_count: how many were.
        steps: reduced so far, dense ones included and skipped ones not.
        metrics: of the last step, by name.
        attempts: steps, with those that were left out.
        everyone: all ranks, of all nodes.
        residual: ``(elements,)``, what waits on this rank.
    """

    def __init__(
        self,
        module: nn.Module,
        density: float = 0.01,
        *,
        mode: str = "streamed",
        dense_steps: int = 0,
        ranks_per_node: int = 1,
        clip_norm: float | None = None,
        unused_parameters: bool = False,
        auto: bool = False,
        measure_every: int = 50,
        assumption_every: int = 0,
        group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        loss_scale: Callable[[], float] = lambda: 1.0,
        **settings: Any,
    ) -> None:
        self.options = HookOptions(
            density, mode, dense_steps, ranks_per_node, clip_norm, unused_parameters, auto, measure_every, assumption_every
        )
        self._settings = settings
        self.cores = [SparseAllreduceState(**settings)]
        self.options.check_settings(self.cores[0].settings)
        parameters = _parameters(module)
        self._used: set[str] = set()  # parameters with a gradient since their bucket was last taken
        self._watching = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._used.add(name))
            for name, parameter in (parameters.items() if unused_parameters else ())
        ]
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        first = next(iter(parameters.values()))
        timeout = timeout_of(group, first.device) if timeout is None else timeout
        self.nodes = Nodes(group, ranks_per_node, timeout, first.device)
        self.exchange = Exchange(self.nodes.between, first.device, self.cores[0].traffic)
        everyone = dist.new_group(_members(group), timeout=timeout)
        self.everyone = Exchange(everyone, first.device)
        self._groups = [*self.nodes.groups, everyone]
        # Backward fills the last layers first: in this order buckets lie in few runs.
        sizes = {name: self.nodes.chunk(math.prod(self.shapes[name])) for name in reversed(self.shapes)}
        self.layout = Layout(sizes, [list(sizes)])
        self.k = self.options.elements_sent(self.layout.elements, self.exchange.ranks)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
        self.residual = torch.zeros(self.layout.elements, dtype=dtype, device=first.device)
        self.acc = torch.empty_like(self.residual)
        self.loss_scale = loss_scale
        self.skipped, self.skipped_count, self.steps, self.passes = False, 0, 0, 0
        self.metrics: dict[str, float] = {}
        self.advice = Advice() if auto else None
        self._checked = False
        self._pass: BackwardPass | None = None
        self._error: BaseException | None = None
        self._worker = Worker(first.device)

    def __repr__(self) -> str:
        return f"OkTopkState({self.options}, {self.cores[0]!r})"

    @property
    def attempts(self) -> int:
        """Steps so far, those that were left out among them."""
        return self.steps + self.skipped_count

    @property
    def traffic(self) -> Traffic:
        """Bytes and seconds by phase between nodes, since it was last cleared."""
        return self.exchange.traffic

    @property
    def dense(self) -> bool:
        """Whether the coming step reduces the whole gradient."""
        return self.steps < self.options.dense_steps or (self.advice is not None and self.advice.dense)

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Queue a bucket and return the future of its mean over all ranks."""
        if isinstance(bucket, tuple):  # type: ignore[unreachable]  # of what DDP promises
            raise InputError(
                "compiled autograd hands over single gradients instead of DDP's buckets; train without "
                "torch._dynamo.config.optimize_ddp = 'python_reducer'"
            )
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise InputError("a gradient is sparse; make its embedding with sparse=False, whose gradient can be compressed")
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.device.type == "cuda" else None
        )
        names = [self._names[id(parameter)] for parameter in bucket.parameters()]
        used = self._used.intersection(names)
        self._used -= used
        arrived = Arrived(bucket.index(), names, buffer, bucket.is_last(), future, frozenset(used))
        # To C++ an exception in a future is an object like any other; raised in a callback its text gets through.
        given = future.then(lambda done: done.value())
        self._worker.submit(lambda: self._process(arrived))
        return given

    def check_ranks(self) -> None:
        """Compare model, settings and steps over all ranks, once before the first step and once after a state was loaded.

        Raises:
            InputError: on every rank, naming the first difference.
        """
        if not self._checked:
            alike = {f"the shape of {name}": shape for name, shape in self.shapes.items()}
            settings = {**vars(self.options), **vars(self.cores[0].settings), "parameters": len(alike)}
            agree(FINE, [], {"steps": self.steps, "settings": {**settings, **alike}}, self.everyone)
            self._checked = True

    def rearrange(self, segments: Sequence[Sequence[str]]) -> None:
        """Lay the vector out in other segments, each residual with its parameter."""
        layout = Layout(self.layout.sizes, segments)
        moved = torch.empty_like(self.residual)
        for name, size in layout.sizes.items():
            old, new = self.layout.starts[name], layout.starts[name]
            moved[new : new + size] = self.residual[old : old + size]
        self.residual, self.layout = moved, layout
        if self.options.mode == "per_bucket":
            self.cores = [SparseAllreduceState(**self._settings) for _ in segments]
            for core in self.cores:
                core.traffic = self.traffic
        else:
            self.cores[0].routings = [Routing() for _ in (segments if self.options.mode == "streamed" else [None])]

    def rank_state_dict(self) -> dict[str, Any]:
        """Return all that this rank needs to go on: tensors and plain values."""
        spans = {name: (start, start + self.layout.sizes[name]) for name, start in self.layout.starts.items()}
        return {
            "ranks": self.exchange.ranks,
            "rank": self.exchange.rank,
            "ranks_per_node": self.nodes.inside,
            "place": self.nodes.place,
            "mode": self.options.mode,
            "shapes": self.shapes,
            "segments": self.layout.segments,
            "residual": {name: self.residual[start:end].cpu().clone() for name, (start, end) in spans.items()},
            "cores": [core.state_dict() for core in self.cores],
            "steps": self.steps,
            "skipped_count": self.skipped_count,
            "sparse": None if self.advice is None else self.advice.sparse,
        }

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``rank_state_dict`` was taken, or ``merge_rank_states`` has made of it.

        Raises:
            InputError: if it is of another model, or of another number of ranks.
        """
        check_fits(state, self.shapes, self.exchange.ranks, self.nodes.inside)
        self.rearrange(state["segments"] if state["mode"] == self.options.mode else [list(self.layout.starts)])
        for name, start in self.layout.starts.items():
            self.residual[start : start + self.layout.sizes[name]] = state["residual"][name].to(self.residual.device)
        if state["mode"] == self.options.mode and state["cores"]:
            for core, saved in zip(self.cores, state["cores"], strict=True):
                core.load_state_dict(saved)
        self.steps, self.skipped_count = state["steps"], state["skipped_count"]
        if not self.passes:  # later on the steps themselves compare what is alike
            self._checked = False
        if self.advice is not None and state["sparse"] is not None:
            self.advice.sparse = state["sparse"]

    def close(self, *, keep_groups: bool = False) -> None:
        """End the worker thread, let go of the parameters, and end the process groups that were made here.

        Args:
            keep_groups: after a failure, when ending them could wait for ranks that are lost.
        """
        self._worker.close()
        for handle in self._watching:
            handle.remove()
        if not keep_groups and dist.is_initialized():
            for group in self._groups:
                dist.destroy_process_group(group)
        self._groups = []

    def _process(self, bucket: Arrived) -> None:
        """Do a bucket's work, in the worker; whatever goes wrong arrives where backward waits."""
        if bucket.index == 0:
            self._pass = None  # a pass that an exception in backward has cut short
        try:
            if self._error is not None:
                raise self._error
            self.check_ranks()
            self._pass = BackwardPass(self) if self._pass is None else self._pass
            self._pass.arrive(bucket)
        except BaseException as error:
            self._error = error
            for waiting in self._pass.arrived if self._pass is not None else []:
                if not waiting.future.done():
                    waiting.future.set_exception(error)  # type: ignore[arg-type]
            if not bucket.future.done():
                bucket.future.set_exception(error)  # type: ignore[arg-type]


def _members(group: dist.ProcessGroup | None) -> list[int]:
    return list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    wrapped = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    assert isinstance(wrapped, nn.Module)
    ignored = set(getattr(wrapped, "_ddp_params_and_buffers_to_ignore", ()))
    found = {name: p for name, p in wrapped.named_parameters() if p.requires_grad and name not in ignored}
    if not found:
        raise InputError("the module has no parameter that requires a gradient; there is nothing to reduce")
    for name, parameter in found.items():
        if not parameter.dtype.is_floating_point:
            raise InputError(f"{name} is {parameter.dtype}; only real floating-point gradients can be selected by magnitude")
    for name, part in wrapped.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise InputError(
                f"{name or 'the module'} is an embedding with sparse gradients; make it with sparse=False, whose gradient "
                "can be compressed"
            )
    return found
