"""How training loaders get back to a batch in the middle of an epoch, in one of three ways.

    state   a loader with a ``state_dict`` is given it, if nothing is lost by that
    replay  the batches that the epoch has seen are fetched once more, with the same random numbers
    skip    the loader's sampler leaves them out; no sample of them is read

A loader's state has not the random generators of its worker processes: a data set with indices and workers is replayed even
where the loader has a state, and skipped or put back by its state only where the user says that it draws nothing.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.random_state import set_random_state, take_random_state

ALL = sys.maxsize  # batches to skip: more than any sampler has


def ways(loaders: Sequence[object], mode: str, replay: bool) -> list[str]:
    """Return how each loader gets back: ``"state"``, ``"replay"`` (all of them, or none) or ``"skip"``.

    Args:
        loaders: of one training.
        mode: of Lightning's ``CombinedLoader`` around them.
        replay: False where the data draw no random numbers, so that nothing has to be fetched once more.

    Raises:
        InputError: naming the loader and its data set, where there is no way back.
    """
    for number, loader in enumerate(loaders):
        if _is_iterable(loader) and not is_stateful(loader):
            raise InputError(
                f"training loader {number} reads {_data_set(loader)}, iterable and without a state, so no run can go on "
                "where it was; use torchdata's StatefulDataLoader with a data set that has state_dict and load_state_dict"
            )
        if replay and _only_counts(loader):
            raise InputError(
                f"training loader {number} reads {_data_set(loader)}, iterable and without a state of its own, so torchdata's "
                "StatefulDataLoader may fetch once more, with other random numbers; give the data set state_dict and "
                "load_state_dict, or give replay=False if its iterators have them or if it draws none"
            )
    # A loader that has ended before the others begins anew when it is given its state.
    ends_early = mode == "max_size" and len(loaders) > 1
    if replay and not ends_early and all(is_stateful(one) and not _loses_random_numbers(one) for one in loaders):
        return ["state"] * len(loaders)
    found = [_way(number, loader, replay) for number, loader in enumerate(loaders)]
    if ends_early and "state" in found:
        raise InputError(
            f"training loader {found.index('state')} goes on by its state, which CombinedLoader(mode='max_size') cannot; use "
            "mode='min_size' or 'max_size_cycle'"
        )
    if "state" in found and "replay" in found:
        number = found.index("state")
        raise InputError(
            f"training loader {number} ({_data_set(loaders[number])}) goes on by its state alone, beside loader "
            f"{found.index('replay')}, of which batches are fetched once more; give replay=False if the data of that one draw no "
            "random numbers"
        )
    return found


def _way(number: int, loader: object, replay: bool) -> str:
    if _is_iterable(loader) or (is_stateful(loader) and not (replay and isinstance(loader, DataLoader))):
        return "state"
    if replay and getattr(loader, "persistent_workers", False):
        raise InputError(
            f"training loader {number} has persistent_workers=True, whose random numbers go on from epoch to epoch and "
            "cannot be read; set persistent_workers=False, or give replay=False if the data draw no random numbers"
        )
    if not replay and not isinstance(loader, DataLoader):
        raise InputError(
            f"replay=False skips batches in a DataLoader's sampler, and training loader {number} is a "
            f"{type(loader).__name__}; give replay=True"
        )
    return "replay" if replay else "skip"


def is_stateful(loader: object) -> bool:
    """Return whether a loader can be given its state."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _is_iterable(loader: object) -> bool:
    return isinstance(getattr(loader, "dataset", loader), IterableDataset)


def _only_counts(loader: object) -> bool:
    """Return whether the state of torchdata's loader is but the number of batches."""
    is_torchdata = any(base.__module__.startswith("torchdata.") for base in type(loader).__mro__)
    return is_torchdata and _is_iterable(loader) and not is_stateful(loader.dataset)  # type: ignore[attr-defined]


def _loses_random_numbers(loader: object) -> bool:
    return isinstance(loader, DataLoader) and not _is_iterable(loader) and loader.num_workers > 0


def _data_set(loader: object) -> str:
    return type(getattr(loader, "dataset", loader)).__name__


class SkippingSampler:
    """A sampler, the first batches of whose passes are left out.

    Args:
        sampler: of batches, or of indices where a loader makes no batches.
        batches: to leave out, ``ALL`` for an empty pass that draws what a whole one draws.
    """

    def __init__(self, sampler: Any, batches: int) -> None:
        self.sampler, self.batches = sampler, batches

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self._left = self.batches
        self._pass = iter(self.sampler)
        return self

    def __next__(self) -> Any:
        self.skip()
        return next(self._pass)

    def skip(self) -> None:
        """Leave them out now, not when the next one is asked for: that draws the order."""
        left, self._left = self._left, 0
        for number, _ in enumerate(self._pass if left else (), 1):
            if number == left:
                break


@contextlib.contextmanager
def skipping(loader: DataLoader[Any], batches: int) -> Iterator[SkippingSampler]:
    """Let the iterators that a loader makes meanwhile leave out their first batches."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    sampler = SkippingSampler(getattr(loader, name), batches)
    # A loader refuses to be given another sampler, but not in its dictionary.
    vars(loader)[name] = sampler
    try:
        yield sampler
    finally:
        vars(loader)[name] = sampler.sampler
        sampler.batches = 0  # of persistent workers, which keep it


class StandIn:
    """What stands for a loader where iterators are made, and has its length.

    Args:
        loader: with or without a length.
        begin: returns an iterator.
    """

    def __init__(self, loader: Any, begin: Callable[[], Iterator[Any]]) -> None:
        self.loader, self._begin = loader, begin

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self._begin()


def take_random(loaders: Sequence[object]) -> dict[str, Any]:
    """Return the state of this process' random generators, and of the loaders' own."""
    return {**take_random_state(), "loaders": [generator.get_state() for generator in _generators(loaders)]}


def set_random(state: Mapping[str, Any], loaders: Sequence[object]) -> None:
    """Put generators back to what ``take_random`` returned."""
    set_random_state(state)
    for generator, own in zip(_generators(loaders), state["loaders"], strict=False):
        generator.set_state(own)


def _generators(loaders: Sequence[object]) -> list[torch.Generator]:
    found = {}
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
