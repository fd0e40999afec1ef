"""Which exceptions of Lightning mean that the user asked for something impossible, and not that there is a defect.

A constructor that refuses does so with ValueError or TypeError. Lightning itself refuses late, often inside ``fit``, with the
same classes as any defect: there, an error counts as a refusal if Lightning's own code raised it, and that before the first batch
or with none of the user's code under way. A defect in a training step, or a misuse of Lightning in one, keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from lightning_plugins._lightning import NAMESPACE, Callback, LightningModule, Trainer, submodule
from lightning_plugins._support.errors import InputError, as_input_error, one_line
from lightning_plugins.recipes.yaml_errors import innermost

# Packages whose frames may stand between Lightning's own without being the user's.
_BETWEEN = ("torch", "contextlib", "functools")


class _FirstBatch(Callback):
    """Remembers whether any batch has been begun."""

    begun = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.begun = True

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.begun = True


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what a constructor refuses into an `InputError` with the innermost cause's own words.

    Raises:
        InputError: the refusal. Other exceptions pass unchanged: they are defects.
    """
    try:
        yield
    except Exception as error:
        if as_input_error(error) is not None:
            raise
        cause = innermost(error)
        if isinstance(cause, _misconfiguration()):
            raise _of_lightning(cause) from error
        if isinstance(cause, ValueError | TypeError):
            raise InputError(one_line(str(cause))) from error
        raise


@contextmanager
def fit_refusals(trainer: Any) -> Iterator[None]:
    """Turn what Lightning refuses while ``trainer`` fits or validates into an `InputError`.

    Raises:
        InputError: the refusal. Other exceptions pass unchanged: they are defects.
    """
    first_batch = _FirstBatch()
    trainer.callbacks.append(first_batch)
    try:
        yield
    except (ValueError, RuntimeError, _misconfiguration()) as error:
        if as_input_error(error) is not None:
            raise
        ours = {NAMESPACE.partition(".")[0], _misconfiguration().__module__.partition(".")[0]}
        packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
        inside = packages[next((i for i, package in enumerate(packages) if package in ours), len(packages)) :]
        if inside and inside[-1] in ours and (not first_batch.begun or ours.union(_BETWEEN).issuperset(inside)):
            raise _of_lightning(error) from error
        raise
    finally:
        trainer.callbacks.remove(first_batch)


def _of_lightning(error: BaseException) -> InputError:
    return InputError(f"Lightning refuses these settings: {one_line(str(error))}; change them under trainer:")


def _misconfiguration() -> type[Exception]:
    return submodule("utilities.exceptions").MisconfigurationException
