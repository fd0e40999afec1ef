"""Ok-Topk for any Trainer on several processes: ``Trainer(strategy=OkTopkStrategy(density=0.01))``."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_plugins._lightning import DDPStrategy, LightningModule, MisconfigurationException, built_for
from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce import OkTopkState, ok_topk_hook
from lightning_plugins.engines.sparse_allreduce.hook_options import HookOptions
from lightning_plugins.engines.sparse_allreduce.settings import Settings
from lightning_plugins.strategies import _rank_files as files
from lightning_plugins.strategies._residuals import StepLog, check_ddp_options, check_log_every, restore, shown


class OkTopkStrategy(DDPStrategy):
    """DDP whose gradients travel as their largest entries; the rest waits in residuals, and nothing is lost.

    It works on CPU and GPU, with accumulated gradients, mixed precision, unused parameters, several optimizers and manual
    optimization. Checkpoints get a folder beside them with what differs by rank; a run that is resumed on as many ranks goes on
    with the same bits, on another number with the same mass. A step in which a rank's gradient is not finite is left out on all
    ranks. It logs, under ``ok_topk/``: ``selected_over_k``, ``reached_over_k``, ``selected_globally_over_k``,
    ``load_imbalance``, ``residual_over_gradient`` and ``gradient_norm`` (of rank 0), ``assumption_ratio``, ``sent_mb`` and
    ``received_mb`` (a step, between nodes), ``skipped_count``, ``predicted_gain`` (with ``auto``), and the milliseconds of each
    phase. A second fit of the same module goes on with its residuals.

    Args:
        density: share of the gradient that is sent, in (0, 1].
        mode: ``streamed`` sends each bucket while backward still runs, ``global`` all at its end, ``per_bucket`` with a
            threshold for each bucket.
        dense_steps: steps at the start that reduce the whole gradient.
        threshold: between exact computations: ``servo``, ``reused``, ``sampled`` (not streamed) or ``exact`` (at every step).
        threshold_every: steps between two exact computations of thresholds.
        repartition_every: steps between two cuts of the vector into regions.
        cuts: ``histogram`` or ``average``, the paper's.
        owners: ``local`` gives regions to ranks that have much of them, ``rank`` gives region r to rank r.
        indices: code of the positions: ``auto``, ``int32``, ``delta16`` or ``bitmap``.
        values: ``exact`` or ``bfloat16``.
        ranks_per_node: above 1, so many ranks reduce densely among themselves, and only nodes sparsely.
        clip_norm: each rank clips its gradient to ``clip_norm / sqrt(ranks)`` before the selection; with ``mode="global"``.
        auto: time the first steps, dense ones and sparse ones, and stay dense if these are not 1.1 times as fast.
        log_every: steps between two logs.
        assumption_every: steps between two measurements of the paper's assumption, two dense reductions each; 0 for none.
        ddp: further arguments of ``DDPStrategy``, such as ``find_unused_parameters``, ``bucket_cap_mb`` or ``timeout``.

    Raises:
        InputError: for a value out of range or options that do not go together; at the first step, on every rank, if ranks
            differ in model or settings; before training, for parameters that cannot be reduced sparsely.
    """

    def __init__(
        self,
        density: float = 0.01,
        *,
        mode: str = "streamed",
        dense_steps: int = 0,
        threshold: str = "servo",
        threshold_every: int = 32,
        repartition_every: int = 64,
        cuts: str = "histogram",
        owners: str = "local",
        indices: str = "auto",
        values: str = "exact",
        ranks_per_node: int = 1,
        clip_norm: float | None = None,
        auto: bool = False,
        log_every: int = 50,
        assumption_every: int = 0,
        **ddp: Any,
    ) -> None:
        check_ddp_options(ddp, DDPStrategy)
        check_log_every(log_every)
        unused = bool(ddp.get("find_unused_parameters", False))
        self._options = HookOptions(
            density, mode, dense_steps, ranks_per_node, clip_norm, unused, auto, log_every, assumption_every
        )
        self._settings = Settings(threshold, threshold_every, repartition_every, cuts, owners, indices, values)
        self._options.check_settings(self._settings)
        self.ok_topk: OkTopkState | None = None
        self._log, self._skips_seen = StepLog(log_every), 0
        self._restored_from: tuple[str, dict[str, Any]] | None = None
        self._training: weakref.ref[nn.Module] | None = None  # what `ok_topk` has the residuals of
        self._running = self._loaded = False
        super().__init__(**ddp)

    def __repr__(self) -> str:
        return f"OkTopkStrategy({shown(self._options, self._settings)}; {built_for()})"

    def configure_ddp(self) -> None:
        """Make the state, and compare the ranks' models before DDP does, whose own check names no parameter."""
        assert self.lightning_module is not None
        if self.world_size == 1:
            warnings.warn(
                "OkTopkStrategy has one process: there is nothing to send, and gradients are still selected; start several with "
                "devices=N or --nproc-per-node N",
                stacklevel=2,
            )
        earlier = self.ok_topk if self._training is not None and self._training() is self.lightning_module else None
        self.ok_topk = OkTopkState(
            self.lightning_module,
            timeout=self._timeout,
            loss_scale=self._loss_scale,
            **vars(self._options),
            **vars(self._settings),
        )
        self.ok_topk.check_ranks()
        if self._restored_from is not None:
            restore(self.ok_topk, *self._restored_from)
        elif earlier is not None and not self._loaded and earlier.shapes == self.ok_topk.shapes:
            self.ok_topk.load_rank_state_dict(earlier.rank_state_dict())
        self._log, self._skips_seen = StepLog(self._options.measure_every), self.ok_topk.skipped_count
        self._loaded = False
        self._training, self._running = weakref.ref(self.lightning_module), True
        super().configure_ddp()

    def _register_ddp_hooks(self) -> None:
        # Lightning's own registers hooks on CUDA alone.
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self.ok_topk, ok_topk_hook)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: LightningModule | nn.Module | None = None, **kwargs: Any
    ) -> Any:
        """Step, unless a rank's gradient was not finite; then the optimizer finds no gradient at all."""
        output = super().optimizer_step(optimizer, lambda: self._without_bad_gradients(closure()), model, **kwargs)
        assert self.ok_topk is not None
        assert self.lightning_module is not None
        if values := self._log.values(self.ok_topk):
            self._write(values)
        return output

    def rank_state_dict(self) -> dict[str, Any]:
        """Return what this rank alone has: residuals, thresholds, cuts, counters; tensors and plain values."""
        if self.ok_topk is None:
            raise InputError("OkTopkStrategy has no state before the fit; ask for it while a Trainer runs")
        return self.ok_topk.rank_state_dict()

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Take in what `rank_state_dict` returned on the same rank."""
        if self.ok_topk is None:
            raise InputError("OkTopkStrategy has no state before the fit; load it while a Trainer runs")
        self.ok_topk.load_rank_state_dict(state)
        self._skips_seen = self.ok_topk.skipped_count

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write every rank's file, then the checkpoint that names them."""
        if self.ok_topk is None or "optimizer_states" not in checkpoint:  # weights alone go nowhere on
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        token = self.broadcast(files.new_token())
        self.checkpoint_io.save_checkpoint(self.rank_state_dict(), files.file_of(filepath, token, self.global_rank))
        self.barrier()
        checkpoint[files.KEY] = files.described(token, self.world_size)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero:
            files.remove_older(filepath, token)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the checkpoint, and its ranks' files: at once where a fit runs already (rate finders), else when it starts."""
        chosen = {} if weights_only is None else {"weights_only": weights_only}  # Lightning 2.5 has no such argument
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, **chosen)
        described = checkpoint.get(files.KEY)
        self._loaded = not self._running  # other weights: what waits from an earlier fit is not theirs
        self._restored_from = None if described is None else (str(checkpoint_path), described)
        if self._running and self._restored_from is not None:
            assert self.ok_topk is not None
            restore(self.ok_topk, *self._restored_from)
            self._skips_seen = self.ok_topk.skipped_count
        return checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove the checkpoint, then its ranks' files."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(files.folder_of(filepath))

    def on_exception(self, exception: BaseException) -> None:
        """End the worker: Lightning calls no teardown after a crash."""
        super().on_exception(exception)
        self._close(failed=True)

    def teardown(self) -> None:
        """End the worker and the process groups."""
        self._close()
        super().teardown()

    def _close(self, failed: bool = False) -> None:
        if self.ok_topk is not None:
            self.ok_topk.close(keep_groups=failed)
        self._restored_from, self._running = None, False

    def _write(self, values: dict[str, float]) -> None:
        assert self.lightning_module is not None
        try:
            self.lightning_module.log_dict(values, on_step=True, on_epoch=False)
        except MisconfigurationException:  # an optimizer that steps in a hook where Lightning logs nothing by the step
            for logger in self.lightning_module.loggers:
                logger.log_metrics(values, step=self.lightning_module.global_step)

    def _loss_scale(self) -> float:
        scaler = getattr(self.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    def _without_bad_gradients(self, result: Any) -> Any:
        assert self.ok_topk is not None
        assert self.lightning_module is not None
        # Several passes may come before a step. A gradient scaler has to see for itself, to lower its scale.
        bad = self.ok_topk.skipped_count > self._skips_seen
        self._skips_seen = self.ok_topk.skipped_count
        if bad and getattr(self.precision_plugin, "scaler", None) is None:
            for parameter in self.lightning_module.parameters():
                parameter.grad = None
        return result
