"""For recipes that fit many times: what Lightning says of each Trainer is kept off the screen."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_plugins._lightning import NAMESPACE

# Where Lightning's halves log that are not the Trainer's own.
_OTHERS = ("lightning_fabric", "lightning.fabric", "lightning_utilities")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what Lightning says of each Trainer off the screen: there are dozens of them."""
    loggers = [logging.getLogger(name) for name in (NAMESPACE, *_OTHERS)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=NAMESPACE.partition(".")[0])
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
