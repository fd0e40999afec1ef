"""The private touches of Lightning that exact resuming needs, all of them; ``test_seams.py`` says which one has changed.

A state is taken *between* two iterations of the training loop, right before the next batch is fetched: optimizer, schedulers,
validation and metrics of the last iteration are done then, and no gradient waits unless batches are being accumulated. No
callback hook stands there; the fetcher's profiling hook does.

Nothing of a run changes by being watched: no random number is drawn, no loader is replaced. Going on at a batch in the middle
of an epoch takes older states of the random generators, noted as the run goes by: when the loaders were made, when the epoch's
iterators were made (which draws the workers' seed, and with workers the order), when its first batch was fetched (which draws the
order without workers), and when a loader that had ended before the others began anew.

Of data without a length Lightning fetches one batch ahead, so that a state between two iterations is that of a later batch. There
loaders and generators are noted before every fetch, and the batch in hand is fetched once more.
"""

import contextlib
import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_plugins._lightning import Trainer, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.callbacks.memory_checkpoint._loaders import (
    ALL,
    SkippingSampler,
    StandIn,
    set_random,
    skipping,
    take_random,
    ways,
)
from lightning_plugins.engines.resilience.random_state import set_random_state, take_random_state


class OpenedLoop:
    """A trainer's training loop, with a way in between two iterations.

    Args:
        trainer: before its ``fit`` has begun to train.
        at_boundary: called between two iterations on every rank, before each batch is fetched.
        replay: fetch once more what an epoch has seen, where a loader's state is not enough; False skips it in the sampler.

    Attributes:
        replay_s: seconds that a replay took, None where there was none.
    """

    def __init__(self, trainer: Trainer, at_boundary: Callable[[], None], replay: bool = True) -> None:
        self.trainer = trainer
        self.replay = replay
        self.replay_s: float | None = None
        self._at_boundary = at_boundary
        self._seen: dict[str, Any] = {}
        self._fetches = 0  # begun in this epoch
        self._in_hand: dict[str, Any] = {}
        self._resumed: Mapping[str, Any] | None = None
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._originals = (
            fit_loop.setup_data,
            fit_loop._load_combined_loader_states,
            epoch_loop.on_run_start,
            epoch_loop._on_before_fetch,
        )
        # Lightning looks them up on the instance, so that its own classes stay as they are.
        fit_loop.__dict__.update(setup_data=self._setup_data, _load_combined_loader_states=self._on_loaders_made)
        epoch_loop.__dict__.update(on_run_start=self._on_run_start, _on_before_fetch=self._on_before_fetch)

    def close(self) -> None:
        """Take the way in out again."""
        fit_loop = self.trainer.fit_loop
        for loop, name in (
            (fit_loop, "setup_data"),
            (fit_loop, "_load_combined_loader_states"),
            (fit_loop.epoch_loop, "on_run_start"),
            (fit_loop.epoch_loop, "_on_before_fetch"),
        ):
            vars(loop).pop(name, None)

    def take(self) -> dict[str, Any]:
        """Return the state of everything, between two iterations: Lightning's checkpoint, and what is not in it."""
        trainer = self.trainer
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        is_ahead = self._fetcher.length is None and self._fetches > 0
        checkpoint["exact_resume"] = {
            **self._seen,
            "random": self._take_random(),
            "fetches": self._fetches,
            "in_hand": self._in_hand if is_ahead else None,
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
        if fit_loop._combined_loader is not None and not fit_loop._should_reload_train_dl:
            return
        if self._resumed is not None:
            set_random_state(self._resumed["loaders_made"])
        self._seen["loaders_made"] = take_random_state()
        self._originals[0]()
        if fit_loop._combined_loader is None:  # nothing to train on
            return
        self._fetches = self._fetcher.fetched
        if self._resumed is not None:
            self._combined.flattened = [stand_in.loader for stand_in in self._combined.flattened]

    def _on_loaders_made(self) -> None:
        """Note how the iterators begin that are made next; a run that goes on makes them when its epoch begins, not here."""
        if self._resumed is None:
            self._originals[1]()
            self._before_iterators(made_before=False)
        else:
            self._combined.flattened = [StandIn(loader, lambda: iter(())) for loader in self._combined.flattened]

    def _before_iterators(self, made_before: bool) -> None:
        self._seen.update(iterator_made=self._take_random(), iterators_made_before=made_before, first_fetch=None, begun_anew={})
        self._fetches = 0
        self._in_hand = {"loaders": None, "random": None}

    def _on_run_start(self, data_fetcher: Any) -> None:
        fit_loop = self.trainer.fit_loop
        if self._resumed is None:
            # A run that goes on from a named checkpoint keeps those of setup_data; older Lightnings had no word for it.
            keeps = fit_loop.epoch_loop.restarting or getattr(fit_loop, "is_resuming", False)
            if self.trainer.current_epoch > 0 and not keeps:
                self._before_iterators(made_before=True)
            self._originals[2](data_fetcher)
            self._watch(data_fetcher, {})
            return
        resumed, self._resumed = self._resumed, None
        names = ("loaders_made", "iterator_made", "iterators_made_before", "first_fetch", "begun_anew")
        self._seen = {name: resumed[name] for name in names}
        self._go_to(data_fetcher, resumed)
        self._originals[2](data_fetcher)
        # The iteration was complete when the state was taken: Lightning would validate or skip for it once more, and would leave
        # out the step of a ReduceLROnPlateau at the end of a resumed epoch.
        fit_loop.restarting = False
        _restore_logged(self.trainer, resumed["logged"])
        _restore_metrics(self.trainer.lightning_module, resumed["metrics"])
        _restore_buffers(self.trainer.lightning_module, resumed["buffers"])
        if self._fetches == resumed["fetches"]:
            self._set_random(resumed["random"])

    def _go_to(self, data_fetcher: Any, resumed: Mapping[str, Any]) -> None:
        """Make the epoch's iterators, at the batch where they were."""
        start_s = time.perf_counter()
        fit_loop, combined = self.trainer.fit_loop, data_fetcher.combined_loader
        loaders, in_hand = combined.flattened, resumed["in_hand"]
        way = ways(loaders, combined._mode, self.replay)
        replays = "replay" in way
        done = resumed["fetches"] - (in_hand is not None)  # batches that nobody gets any more
        states, fit_loop._combined_loader_states_to_load = fit_loop._combined_loader_states_to_load, []
        self._in_hand = in_hand or {"loaders": states, "random": resumed["random"]}
        self._fetches = 0 if replays else done
        combined.reset()
        if not replays and self._in_hand["loaders"]:
            combined._load_state_dicts(self._in_hand["loaders"])
        with contextlib.ExitStack() as stack:
            samplers = {
                number: stack.enter_context(skipping(loaders[number], ALL if number in resumed["begun_anew"] else done))
                for number, one in enumerate(way)
                if one == "skip"
            }

            def before_fetch() -> None:
                if resumed["first_fetch"] is not None and data_fetcher.fetched == 0:
                    self._set_random(resumed["first_fetch"])
                if not replays:
                    self._skip(combined._iterator, samplers, done, resumed["begun_anew"])
                if self._fetches == done and self._in_hand["random"] is not None:
                    self._set_random(self._in_hand["random"])

            def on_fetch() -> None:
                before_fetch()
                self._fetches += 1

            data_fetcher._start_profiler = on_fetch
            if resumed["iterators_made_before"]:
                self._begin_persistent(loaders, samplers)
            self._set_random(resumed["iterator_made"])
            iter(data_fetcher)
            if data_fetcher.fetched == 0 and not replays:
                before_fetch()
        self._watch(data_fetcher, resumed["begun_anew"])
        if replays:
            while self._fetches < resumed["fetches"]:
                next(data_fetcher)
            data_fetcher.fetched -= done  # Lightning adds them itself when the epoch begins
            if done:
                self.replay_s = time.perf_counter() - start_s
                rank_zero_info(f"fetched the {done} batches once more that the epoch had seen: {self.replay_s:.2f} s")

    def _skip(self, iterator: Any, samplers: Mapping[int, SkippingSampler], done: int, begun_anew: Mapping[int, Any]) -> None:
        """Leave out what the epoch has seen; of a loader that has begun anew, what was seen since."""
        for sampler in samplers.values():
            sampler.skip()
        for number, note in begun_anew.items():
            iterator._consumed[number] = True
            if number in samplers:
                samplers[number].batches = done - note["fetch"]
            if number in samplers and note["fetch"] < done:  # else it begins anew when the batch in hand is fetched
                self._set_random(note["random"])
                iterator.iterators[number] = iter(iterator.iterables[number])
                samplers[number].skip()

    def _begin_persistent(self, loaders: Sequence[Any], samplers: Mapping[int, SkippingSampler]) -> None:
        """Make the iterators that persistent workers keep: to begin an epoch with them draws other numbers than to make them."""
        for number, sampler in samplers.items():
            if loaders[number].persistent_workers:
                batches, sampler.batches = sampler.batches, ALL
                iter(loaders[number])
                sampler.batches = batches

    def _watch(self, data_fetcher: Any, begun_anew: Mapping[int, Any]) -> None:
        """Note when a loader ends before the others and begins anew, or let it begin as it did."""
        combined = data_fetcher.combined_loader
        if combined._mode == "max_size_cycle" and len(combined.flattened) > 1:
            combined._iterator.iterables = [
                StandIn(loader, functools.partial(self._begin_anew, loader, number, begun_anew))
                for number, loader in enumerate(combined.flattened)
            ]

    def _begin_anew(self, loader: Any, number: int, begun_anew: Mapping[int, Any]) -> Iterator[Any]:
        fetch = self._fetches - 1
        if number in begun_anew and begun_anew[number]["fetch"] == fetch:
            self._set_random(begun_anew[number]["random"])
        self._seen["begun_anew"] = {**self._seen["begun_anew"], number: {"fetch": fetch, "random": self._take_random()}}
        return iter(loader)

    def _on_before_fetch(self) -> None:
        here = {}
        if self._fetches == 0:
            self._seen["first_fetch"] = self._take_random()
        if self._fetcher.length is None:
            # Copied, since a data set may go on changing what it gave as its state.
            here = {"loaders": copy.deepcopy(self._combined._state_dicts()), "random": self._take_random()}
        self._at_boundary()
        self._in_hand = here
        self._fetches += 1
        self._originals[3]()

    @property
    def _fetcher(self) -> Any:
        return self.trainer.fit_loop._data_fetcher

    @property
    def _combined(self) -> Any:
        return self.trainer.fit_loop._combined_loader

    def _take_random(self) -> dict[str, Any]:
        return take_random(self._combined.flattened)

    def _set_random(self, state: Mapping[str, Any]) -> None:
        set_random(state, self._combined.flattened)


def refuse_loaders(trainer: Trainer, replay: bool = True) -> None:
    """Refuse data that cannot be put back to where it was.

    Args:
        trainer: whose loaders have been made.
        replay: as ``OpenedLoop`` takes it.

    Raises:
        InputError: naming the loader and its data set.
    """
    fetcher, combined = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    assert combined is not None
    if isinstance(fetcher, submodule("loops.fetchers")._DataLoaderIterDataFetcher):
        raise InputError(
            "a training_step that takes dataloader_iter fetches by itself, so no batch can be found again; take batch"
        )
    ways(combined.flattened, combined._mode, replay)


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
