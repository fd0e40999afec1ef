"""The private touches of Lightning that exact resuming needs, all of them; ``test_seams.py`` says which one has changed.

A state is taken *between* two iterations of the training loop, right before the next batch is fetched: optimizer, schedulers,
validation and metrics of the last iteration are done then, and no gradient waits unless batches are being accumulated. No
callback hook stands there; the fetcher's profiling hook does.

Nothing of a run changes by being watched: no random number is drawn, no loader is replaced. Going on at a batch in the middle
of an epoch takes three older states of the random generators, noted as the run goes by: when the loaders were made, when the
epoch's iterator was made (which draws the workers' seed, and with workers the order), and when its first batch was fetched (which
draws the order without workers). The skipped batches are fetched once more, with the same numbers.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_plugins._lightning import Trainer, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.random_state import set_random_state, take_random_state

log = logging.getLogger(__name__)


class OpenedLoop:
    """A trainer's training loop, with a way in between two iterations.

    Args:
        trainer: before its ``fit`` has begun to train.
        at_boundary: called between two iterations on every rank, before each batch is fetched.
    """

    def __init__(self, trainer: Trainer, at_boundary: Callable[[], None]) -> None:
        self.trainer = trainer
        self._at_boundary = at_boundary
        self._seen: dict[str, Any] = {}
        self._resumed: Mapping[str, Any] | None = None
        self._is_first_fetch = False
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._originals = (fit_loop.setup_data, epoch_loop.on_run_start, epoch_loop._on_before_fetch)
        # Lightning looks them up on the instance, so that its own classes stay as they are.
        fit_loop.__dict__["setup_data"] = self._setup_data
        epoch_loop.__dict__.update(on_run_start=self._on_run_start, _on_before_fetch=self._on_before_fetch)

    def close(self) -> None:
        """Take the way in out again."""
        for loop, name in (
            (self.trainer.fit_loop, "setup_data"),
            (self.trainer.fit_loop.epoch_loop, "on_run_start"),
            (self.trainer.fit_loop.epoch_loop, "_on_before_fetch"),
        ):
            vars(loop).pop(name, None)

    def take(self) -> dict[str, Any]:
        """Return the state of everything, between two iterations: Lightning's checkpoint, and what is not in it."""
        trainer = self.trainer
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint["exact_resume"] = {
            **self._seen,
            "random": take_random_state(),
            "batches": trainer.fit_loop.epoch_loop.batch_progress.current.completed,
            "metrics": _metric_states(trainer.lightning_module),
            "buffers": _unsaved_buffers(trainer.lightning_module, checkpoint["state_dict"]),
            "logged": _logged(trainer),
        }
        return checkpoint

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Let ``fit`` go on from what ``take`` returned; called in the ``setup`` hook, before anything is restored."""
        self._resumed = checkpoint["exact_resume"]
        self.trainer._checkpoint_connector._loaded_checkpoint = checkpoint
        # Lightning warns of what is done here.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

    def give_up(self) -> bool:
        """Do not go on from a state after all; return whether there was one."""
        resumed, self._resumed = self._resumed, None
        return resumed is not None

    def _setup_data(self) -> None:
        fit_loop = self.trainer.fit_loop
        if fit_loop._combined_loader is None or fit_loop._should_reload_train_dl:
            if self._resumed is not None:
                set_random_state(self._resumed["loaders_made"])
            self._seen["loaders_made"] = take_random_state()
            self._seen["iterator_made"] = None  # by setup_data itself, right after
        self._originals[0]()

    def _on_run_start(self, data_fetcher: Any) -> None:
        epoch_loop = self.trainer.fit_loop.epoch_loop
        self._is_first_fetch = True
        if self._resumed is None:
            if self.trainer.current_epoch > 0 and not epoch_loop.restarting:
                self._seen["iterator_made"] = take_random_state()
            self._originals[1](data_fetcher)
            return
        resumed, self._resumed = self._resumed, None
        self._seen = {name: resumed[name] for name in ("loaders_made", "iterator_made", "first_fetch")}
        self._is_first_fetch = False
        self._go_to(data_fetcher, resumed)
        self._originals[1](data_fetcher)
        # The iteration was complete when the state was taken: Lightning would validate or skip for it once more, and would leave
        # out the step of a ReduceLROnPlateau at the end of a resumed epoch.
        self.trainer.fit_loop.restarting = False
        _restore_logged(self.trainer, resumed["logged"])
        _restore_metrics(self.trainer.lightning_module, resumed["metrics"])
        _restore_buffers(self.trainer.lightning_module, resumed["buffers"])
        set_random_state(resumed["random"])

    def _go_to(self, data_fetcher: Any, resumed: Mapping[str, Any]) -> None:
        """Fetch what the epoch had fetched already; a loader with a state of its own stands there by itself."""
        if all(_is_stateful(loader) for loader in data_fetcher.combined_loader.flattened):
            return
        start_s, batches = time.perf_counter(), resumed["batches"]
        if resumed["iterator_made"] is not None:
            set_random_state(resumed["iterator_made"])
            iter(data_fetcher)
        if resumed["first_fetch"] is not None:
            set_random_state(resumed["first_fetch"])
        for _ in range(batches):
            next(data_fetcher)
        data_fetcher.fetched -= batches  # Lightning adds them itself when the epoch begins
        if batches:
            log.info("fetched the %d batches once more that the epoch had seen: %.2f s", batches, time.perf_counter() - start_s)

    def _on_before_fetch(self) -> None:
        if self._is_first_fetch:
            self._is_first_fetch = False
            self._seen["first_fetch"] = take_random_state()
        self._at_boundary()
        self._originals[2]()


def refuse_loaders(trainer: Trainer) -> None:
    """Refuse data that cannot be put back to where it was.

    Raises:
        InputError: naming the loader and its data set.
    """
    fetcher, loader = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    assert fetcher is not None
    assert loader is not None
    if isinstance(fetcher, submodule("loops.fetchers")._DataLoaderIterDataFetcher):
        raise InputError(
            "a training_step that takes dataloader_iter fetches by itself, so no batch can be found again; take batch"
        )
    stateful = [_is_stateful(one) for one in loader.flattened]
    if any(stateful) and not all(stateful):
        raise InputError("either all training loaders have a state_dict or none; wrap the others in StatefulDataLoader, too")
    if any(stateful) and fetcher.length is None:
        raise InputError(
            "Lightning fetches one batch ahead of a loader without a length, so its state is that of a later batch; give the "
            "data set a __len__, the number of its samples"
        )
    for number, (one, has_state) in enumerate(zip(loader.flattened, stateful, strict=True)):
        data_set = getattr(one, "dataset", one)
        if not has_state and isinstance(data_set, torch.utils.data.IterableDataset):
            raise InputError(
                f"training loader {number} reads {type(data_set).__name__}, iterable and without a state, so no run can go on "
                "where it was; use torchdata's StatefulDataLoader with a data set that has state_dict and load_state_dict"
            )
        if not has_state and getattr(one, "persistent_workers", False) and getattr(one, "num_workers", 0):
            raise InputError(
                f"training loader {number} has persistent_workers=True, whose random numbers go on from epoch to epoch and "
                "cannot be read; set persistent_workers=False, or use torchdata's StatefulDataLoader"
            )


def _is_stateful(loader: object) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _metrics(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    yield from ((name, part) for name, part in module.named_modules() if isinstance(part, Metric))


def _metric_states(module: nn.Module) -> dict[str, Any]:
    """Return what metrics have gathered since their last reset; their ``state_dict`` is empty by default."""
    found = {}
    for name, metric in _metrics(module):
        found[name] = {"states": {key: getattr(metric, key) for key in metric._defaults}, "updates": metric._update_count}
    return found


def _restore_metrics(module: nn.Module, states: Mapping[str, Any]) -> None:
    for name, metric in _metrics(module):
        if name not in states:
            continue
        for key, value in states[name]["states"].items():
            moved = [one.to(metric.device) for one in value] if isinstance(value, list) else value.to(metric.device)
            setattr(metric, key, moved)
        metric._update_count = states[name]["updates"]
        metric._computed = None


def _unsaved_buffers(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint leaves out."""
    inside = [name for name, _ in _metrics(module)]
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name not in saved and not any(name.startswith(f"{metric}.") for metric in inside)
    }


def _restore_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    own = dict(module.named_buffers())
    for name, value in buffers.items():
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)


_LOGGED = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics")


def _logged(trainer: Trainer) -> dict[str, Any]:
    """Return logged numbers, and the sums of this epoch, which become means at its end."""
    connector = trainer._logger_connector
    sums = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        if metric.is_tensor:
            sums[key] = {name: getattr(metric, name) for name in metric._defaults} | {"updates": metric._update_count}
    return {"sums": sums, **{name: dict(getattr(connector, name)) for name in _LOGGED}}


def _restore_logged(trainer: Trainer, logged: Mapping[str, Any]) -> None:
    connector, results = trainer._logger_connector, trainer.fit_loop.epoch_loop._results
    for name in _LOGGED:
        getattr(connector, name).update(logged[name])
    waiting = dict(logged["sums"])
    update_metrics = results.update_metrics

    def update(key: str, value: Any, batch_size: int) -> None:
        """Put the sum of before under the first number that is logged again: only then does Lightning know how it is reduced."""
        if (sums := waiting.pop(key, None)) is not None and not results[key].has_reset:
            metric = results[key]
            for name in metric._defaults:
                setattr(metric, name, sums[name].to(value.device))
            metric._update_count = sums["updates"]
        if not waiting:
            vars(results).pop("update_metrics", None)
        update_metrics(key, value, batch_size)

    results.update_metrics = update
