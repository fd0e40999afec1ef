"""Ok-Topk for a loop of your own: ``Fabric(strategy=OkTopkFabricStrategy(density=0.01), devices=4)``."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins._lightning import FabricDDPStrategy, built_for
from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce import OkTopkState, ok_topk_hook
from lightning_plugins.engines.sparse_allreduce.hook_options import HookOptions
from lightning_plugins.engines.sparse_allreduce.settings import Settings
from lightning_plugins.strategies import _rank_files as files
from lightning_plugins.strategies._residuals import check_ddp_options, check_log_every, restore, shown


class OkTopkFabricStrategy(FabricDDPStrategy):
    """DDP in Fabric whose gradients travel as their largest entries; see `OkTopkStrategy`, whose options it has.

    ``fabric.setup(module)`` makes the state, ``fabric.save`` and ``fabric.load`` write and read every rank's residuals beside the
    checkpoint. Where a rank's gradient is not finite, ``fabric.backward()`` leaves no gradient on any rank, so that
    ``optimizer.step()`` finds none; with a gradient scaler it is the scaler that leaves the step out.
    ``strategy.ok_topk.metrics`` holds what the last step measured.

    Args:
        density: share of the gradient that is sent, in (0, 1].
        options: further ones of `OkTopkStrategy`, and of Fabric's ``DDPStrategy``.

    Raises:
        InputError: for a value out of range or options that do not go together; at the first step, on every rank, if ranks
            differ in model or settings.
    """

    def __init__(self, density: float = 0.01, **options: Any) -> None:
        check_ddp_options(options, FabricDDPStrategy)
        settings = {name: options.pop(name) for name in Settings.__dataclass_fields__ if name in options}
        own = {name: options.pop(name) for name in HookOptions.__dataclass_fields__ if name in options}
        own.setdefault("unused_parameters", bool(options.get("find_unused_parameters", False)))
        if "log_every" in options:
            check_log_every(options["log_every"])
            own["measure_every"] = options.pop("log_every")
        self._options, self._settings = HookOptions(density, **own), Settings(**settings)
        self._options.check_settings(self._settings)
        self.ok_topk: OkTopkState | None = None
        self._skips_seen = 0
        self._module: nn.Module | None = None
        self._restored_from: tuple[str, dict[str, Any]] | None = None
        super().__init__(**options)

    def __repr__(self) -> str:
        return f"OkTopkFabricStrategy({shown(self._options, self._settings)}; {built_for()})"

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """Wrap a module, the only one that is trained, and register the hook."""
        if self.ok_topk is not None:
            raise InputError("OkTopkFabricStrategy keeps the residuals of one module; set up a second one with its own Fabric")
        self.ok_topk = OkTopkState(
            module, timeout=self._timeout, loss_scale=self._loss_scale, **vars(self._options), **vars(self._settings)
        )
        self._module = module
        self.ok_topk.check_ranks()
        if self._restored_from is not None:
            self._restore(*self._restored_from)
        wrapped = super().setup_module(module)
        wrapped.register_comm_hook(self.ok_topk, ok_topk_hook)
        return wrapped

    def backward(self, tensor: Any, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward; a pass that was left out leaves no gradient, unless a scaler has to see it to lower its scale."""
        super().backward(tensor, module, *args, **kwargs)
        if self.ok_topk is None or self.ok_topk.skipped_count == self._skips_seen:
            return
        self._skips_seen = self.ok_topk.skipped_count
        if self._scaler() is None:
            assert self._module is not None
            self._module.zero_grad()

    def rank_state_dict(self) -> dict[str, Any]:
        """Return what this rank alone has: residuals, thresholds, cuts, counters; tensors and plain values."""
        return self._state().rank_state_dict()

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Take in what `rank_state_dict` returned on the same rank."""
        self._state().load_rank_state_dict(state)
        self._skips_seen = self._state().skipped_count

    def save_checkpoint(self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: Any = None) -> None:
        """Write every rank's file, then the checkpoint that names them."""
        path = self.broadcast(path)
        if self.ok_topk is not None:
            token = self.broadcast(files.new_token())
            self.checkpoint_io.save_checkpoint(self.rank_state_dict(), files.file_of(path, token, self.global_rank))
            self.barrier()
            state = {**state, files.KEY: files.described(token, self.world_size)}
        super().save_checkpoint(path, state, storage_options, filter)
        if self.ok_topk is not None and self.is_global_zero:
            files.remove_older(path, token)

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint, and the residuals of this rank as soon as there is a module."""
        chosen = {} if weights_only is None else {"weights_only": weights_only}  # Lightning 2.5 has no such argument
        left: dict[str, Any] = super().load_checkpoint(path, state, strict, **chosen)
        described = left.pop(files.KEY, None)
        if described is not None and self.ok_topk is not None:
            self._restore(str(path), described)
        elif described is not None:
            self._restored_from = str(path), described
        return left

    def _restore(self, path: str, described: dict[str, Any]) -> None:
        restore(self._state(), path, described)
        self._skips_seen, self._restored_from = self._state().skipped_count, None

    def _state(self) -> OkTopkState:
        if self.ok_topk is None:
            raise InputError("OkTopkFabricStrategy has no state before fabric.setup(module); call that first")
        return self.ok_topk

    def _scaler(self) -> Any:
        return getattr(self.precision, "scaler", None)

    def _loss_scale(self) -> float:
        scaler = self._scaler()
        return 1.0 if scaler is None else scaler.get_scale()
