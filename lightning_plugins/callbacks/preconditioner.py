"""Second-order directions for any Trainer as a callback: ``Trainer(callbacks=[Preconditioner("kfac")])``.

Order of a step: ``on_before_backward`` (the loss is read: what divided and multiplied it), the backward pass (taps collect
curvature), ``on_before_optimizer_step`` (gradients are synchronized and unscaled by then, and not yet clipped by Lightning).
"""

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.optim import Optimizer

from lightning_plugins._lightning import Callback, LightningModule, Trainer
from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.preconditioning import GradientPreconditioner, format_table
from lightning_plugins.engines.preconditioning.options import check_method, split_options
from lightning_plugins.engines.preconditioning.settings import check_count, check_positive


class Preconditioner(Callback):
    """Collect curvature while a module trains, and rewrite its gradients before its optimizers read them.

    Nothing else changes: module, loss and optimizers stay what they are. It works with accumulated gradients, mixed precision,
    several optimizers, manual optimization (through ``manual_backward``), activation checkpointing, ``torch.compile``, DDP, and
    FSDP2 through ``ModelParallelStrategy``. Lightning's own clipping comes after it and sees the new gradients. It logs, under
    ``preconditioner/``: ``damping``, ``clip_factor``, ``refresh_ms`` (per optimizer step, averaged), ``share_of_step_time`` (of
    the batches' time), ``nonfinite_batches_count``, ``unseen_layers_count``, ``doubled_dampings_count`` and
    ``kept_inverses_count``.

    Args:
        method: name in ``lightning_plugins.engines.preconditioning.METHODS``.
        damping: added to the curvature; left out, the method's default.
        factor_every: optimizer steps between two observations of curvature.
        inverse_every: optimizer steps between two refreshes of inverses; a multiple of ``factor_every``.
        fisher: ``empirical``, ``mc``, ``exact`` or ``forward``, as far as the method has them; left out, its default.
        loss: form of the loss (``cross_entropy``, ``squared_error``, ``binary_cross_entropy``) for ``mc`` and ``exact`` where the
            loss's graph does not show it.
        logits: together with ``loss``: the submodule that returns the logits, by name, or their key in the dict that
            ``training_step`` returns.
        clip_raw: largest norm of an optimizer's gradients before they are rewritten.
        log_every: optimizer steps between two logs.
        log_traces: log the trace of every layer's curvature, too.
        name: tells several instances apart, in checkpoints and logs.
        options: further ones of the engine (``warmup_steps``, ``samples``, ``reduction``, ``norms``, ``ignore``, ``kl_clip``,
            ``match_norm``, ``worker_fraction``, ``seed``) and the method's own; in a YAML file they stand under ``dict_kwargs``.

    Raises:
        InputError: for an unknown name, a value out of range or options that do not go together; before training, for a module
            with nothing to precondition and for a strategy whose gradients cannot be read; when a checkpoint is of another model.
    """

    def __init__(
        self,
        method: str = "kfac",
        *,
        damping: float | None = None,
        factor_every: int = 1,
        inverse_every: int = 1,
        fisher: str | None = None,
        loss: str | None = None,
        logits: str | None = None,
        clip_raw: float | None = None,
        log_every: int = 50,
        log_traces: bool = False,
        name: str = "preconditioner",
        **options: Any,
    ) -> None:
        self.method = method
        self.options = {"factor_every": factor_every, "inverse_every": inverse_every, **options}
        self.options |= {
            key: value for key, value in (("damping", damping), ("fisher", fisher), ("loss", loss)) if value is not None
        }
        shared, _ = split_options(method, self.options)
        entry, used = check_method(method, shared)
        self._replays = entry.replays
        if (loss is None) != (logits is None):
            raise InputError(f"loss and logits go together, got loss={loss!r} and logits={logits!r}; give both or neither")
        if loss is not None and used not in ("mc", "exact"):
            raise InputError(f"loss and logits are for fisher='mc' and 'exact', got fisher={used!r}; leave them out")
        if clip_raw is not None:
            check_positive("clip_raw", clip_raw)
        check_count("log_every", log_every)
        self.logits = logits
        self.clip_raw = clip_raw
        self.log_every = log_every
        self.log_traces = log_traces
        self.name = name
        self.engine: GradientPreconditioner | None = None
        self._parked: dict[str, Any] = {}  # state without an engine: from a checkpoint before the fit, or of the last fit
        self._restored = False
        self._observed = False
        self._stepped = False  # in this batch
        self._told: list[str] = []  # layers of the warning, which comes once
        self._prediction: _Prediction | None = None
        self._batch: tuple[Any, int] | None = None  # under way, with its index
        self._seen_batches: list[tuple[Any, int]] = []  # of this step, for a method that replays them
        self._steps = 0
        self._batch_started_s = 0.0
        self._batches_s = 0.0

    def __repr__(self) -> str:
        options = {**self.options, "logits": self.logits, "clip_raw": self.clip_raw, "log_every": self.log_every}
        shown = "".join(f", {key}={value!r}" for key, value in options.items() if value is not None)
        return f"Preconditioner({self.method!r}{shown}, log_traces={self.log_traces}, name={self.name!r})"

    @property
    def state_key(self) -> str:
        """Tells two instances apart by ``name`` alone: options may change between two runs."""
        return f"Preconditioner({self.name})"

    def state_dict(self) -> dict[str, Any]:
        """Return running averages, inverses, counters and the state of the generator: tensors and plain values."""
        return self._parked if self.engine is None else self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take in a state; before the fit it waits for the module to be on its device."""
        if self.engine is None:
            self._parked = state_dict
        elif state_dict:
            self.engine.load_state_dict(state_dict)
            self._restored = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        if stage != "fit":
            return
        _group_of(trainer)
        if trainer.global_step == 0:  # what an earlier fit of another trainer left behind
            self._parked = {}
        if trainer.is_global_zero and any(getattr(other, "save_weights_only", False) for other in trainer.checkpoint_callbacks):
            warnings.warn(
                "checkpoints with save_weights_only=True hold no curvature: a run resumed from them starts the Preconditioner "
                "anew; save whole checkpoints to resume exactly",
                stacklevel=2,
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, with the module on its device and wrapped by the strategy, and before any compiled code of it runs."""
        if _is_compiled(pl_module):
            torch._dynamo.reset()  # code that an earlier validate compiled has no taps in it
        self.engine = GradientPreconditioner(pl_module, self.method, group=_group_of(trainer), **self.options)
        if self.logits is not None:
            self._prediction = _Prediction(pl_module, self.logits)
        if self._replays and not pl_module.automatic_optimization:
            raise InputError(f"{self.method} runs training_step once more after each step, and so needs automatic optimization")
        self._restored, self._observed, self._told, self._steps, self._batches_s = False, False, [], 0, 0.0
        self.load_state_dict(self._parked)
        self._parked = {}
        rank_zero_info(f"{self!r}:\n{format_table(self.engine.table)}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if a resumed run found no state of this instance in its checkpoint."""
        if trainer.global_step > 0 and not self._restored and trainer.is_global_zero:
            warnings.warn(
                f"the run goes on at step {trainer.global_step}, and its checkpoint holds no state of {self.state_key}: "
                "curvature is collected anew; give the instance the name= that it had",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock that ``share_of_step_time`` is a share of."""
        self._batch = (batch, batch_idx) if self._replays else None
        self._batch_started_s = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it, after the optimizer moved and a method that compares saw the step's batches once more."""
        if self._stepped and self._replays:
            assert self.engine is not None
            seen, self._seen_batches = self._seen_batches, []
            self.engine.replay(*(partial(_loss_of, trainer, pl_module, *batch) for batch in seen))
        self._batch, self._stepped = None, False
        self._count_batch_time()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Read the loss, which is divided by accumulation and multiplied by the gradient scaler already."""
        assert self.engine is not None
        if self.engine.taps.armed and self._batch is not None:
            self._seen_batches.append(self._batch)
        wanted = self._prediction if self.engine.taps.armed else None
        self.engine.observe(loss, None if wanted is None else wanted.take())
        self._observed = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Rewrite the gradients of this optimizer's parameters."""
        assert self.engine is not None
        has_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if not self._observed and self.engine.taps.armed and has_gradients:  # training_step may have returned None
            raise InputError("no backward pass went through Lightning; call self.manual_backward(loss), not loss.backward()")
        scale = _gradient_scale(trainer, optimizer)
        if self.clip_raw is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_raw * scale)
        self.engine.precondition(optimizer, gradient_scale=scale)
        self._stepped = True
        self._steps += 1
        silent = [name for name in self.engine.silent() if name not in self._told]
        if silent and trainer.is_global_zero:
            self._told += silent
            warnings.warn(_SILENT.format(", ".join(silent)), stacklevel=2)
        if self._steps % self.log_every == 0:
            self._log(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: Lightning calls no teardown after a crash."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module without a hook of ours; the state stays, for a checkpoint or a fit that goes on."""
        self._release()

    def _release(self) -> None:
        if self.engine is not None:
            self.engine.detach()
            self._parked = apply_to_collection(self.engine.state_dict(), Tensor, lambda tensor: tensor.detach().cpu().clone())
            self.engine = None
        if self._prediction is not None:
            self._prediction.remove()
            self._prediction = None

    def _count_batch_time(self) -> None:
        now_s = time.perf_counter()
        self._batches_s += now_s - self._batch_started_s
        self._batch_started_s = now_s

    def _log(self, pl_module: LightningModule) -> None:
        assert self.engine is not None
        values = self.engine.metrics()
        spent_ms = self.engine.stopwatch.read_ms()
        values["refresh_ms"] = spent_ms.pop("refresh", 0.0) / self.log_every  # a part of the time of `precondition`
        self._count_batch_time()
        values["share_of_step_time"] = sum(spent_ms.values()) / 1000.0 / self._batches_s
        self._batches_s = 0.0
        if self.log_traces:
            values |= {f"trace/{layer}": value for layer, value in self.engine.traces().items()}
        pl_module.log_dict({f"{self.name}/{key}": value for key, value in values.items()}, on_step=True, on_epoch=False)


_SILENT = (
    "these layers have gradients, and nothing was seen to go through them, so they keep the plain gradient: {}. Either something "
    "uses their weights without calling them (ignore=[...] says that this is meant), or their code was compiled before the fit; "
    "then call torch.compile on a module that has not run yet"
)


class _Prediction:
    """The logits of the step under way: what a submodule returned, or a value of the dict that ``training_step`` returned.

    Args:
        module: the module in training.
        source: name of a submodule, or else a key.
    """

    def __init__(self, module: LightningModule, source: str) -> None:
        self.source = source
        self._value: object = None
        parts = {name: part for name, part in module.named_modules() if name}
        self._known = [*parts]  # what could have been named
        self.remove: Callable[[], None]
        if source in parts:
            self.remove = parts[source].register_forward_hook(self._from_submodule).remove
        else:
            self.remove = self._wrap_training_step(module)

    def take(self) -> Tensor:
        """Return the logits of the last forward pass, once."""
        value, self._value = self._value, None
        if not isinstance(value, Tensor):
            raise InputError(
                f"logits={self.source!r} is no submodule that ran in this step and no tensor in the dict that training_step "
                f"returned; {nearest(self.source, self._known)}"
            )
        return value

    def _from_submodule(self, _module: nn.Module, _inputs: object, output: object) -> None:
        if torch.is_grad_enabled():
            self._value = output

    def _wrap_training_step(self, module: LightningModule) -> Callable[[], None]:
        step, own = module.training_step, vars(module).get("training_step")

        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            if isinstance(output, Mapping):
                self._value = output.get(self.source)
                self._known += [key for key in output if key not in self._known]
            return output

        def restore() -> None:
            if own is None:
                del module.training_step
            else:
                module.training_step = own  # type: ignore[method-assign]

        module.training_step = training_step  # type: ignore[method-assign]
        return restore


def _loss_of(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss of a batch once more, past the strategy's wrapper, which would wait for its backward pass."""
    kinds = [parameter.kind for parameter in inspect.signature(module.training_step).parameters.values()]
    both = len(kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds
    with _unlogged(module), trainer.precision_plugin.train_step_context():
        output: Any = module.training_step(batch, batch_idx) if both else module.training_step(batch)
    return output["loss"] if isinstance(output, Mapping) else output


@contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """Keep what a repeated training_step logs out of the metrics."""
    kept: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            delattr(module, name)
        vars(module).update(kept)


def _is_compiled(module: LightningModule) -> bool:
    parts = list(module.modules())
    return getattr(module, "_compiler_ctx", None) is not None or any(
        isinstance(part, OptimizedModule) or getattr(part, "_compiled_call_impl", None) is not None for part in parts
    )


def _gradient_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return what gradients are still multiplied by: fused optimizers undo the gradient scaler themselves, within their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def _group_of(trainer: Trainer) -> dist.ProcessGroup | None:
    """Return the ranks that train replicas or shards of one module, or refuse a strategy whose gradients cannot be read."""
    strategy = trainer.strategy
    kinds = {kind.__name__ for kind in type(strategy).__mro__}  # by name: there are two Lightnings
    works = "it works with one device, DDPStrategy, and ModelParallelStrategy with fully_shard (FSDP2)"
    if "DeepSpeedStrategy" in kinds:
        raise InputError(
            f"Preconditioner cannot work with {type(strategy).__name__}: DeepSpeed keeps the gradients, and steps, inside its "
            f"own engine; {works}"
        )
    if "FSDPStrategy" in kinds:
        raise InputError(
            f"Preconditioner cannot work with {type(strategy).__name__}: FSDP1 flattens the parameters of several layers into "
            f"one, also with use_orig_params=True, where a rank's gradient is a piece without its shape; {works}"
        )
    if trainer.world_size == 1:
        return None
    if "DDPStrategy" in kinds:
        return dist.group.WORLD
    if "ModelParallelStrategy" in kinds:
        mesh = strategy.device_mesh  # type: ignore[attr-defined]
        if mesh["tensor_parallel"].size() == 1:
            return mesh["data_parallel"].get_group()
        raise InputError(
            f"Preconditioner cannot work with tensor_parallel_size={mesh['tensor_parallel'].size()}: layers see parts of their "
            "rows; give ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)"
        )
    raise InputError(f"Preconditioner does not know what {type(strategy).__name__} does to gradients; {works}")
