"""A run whose Trainer expects another number of processes than were launched stops at once.

Without this, two ranks whose Trainer says ``devices=1`` are two trainings that both believe to be rank 0 and write over each
other. Lightning asks the entry-point groups ``<namespace>.callbacks_factory`` for callbacks of every Trainer in the environment:
both factories give nothing unless `lightning run` launched several ranks, which it says in a variable. The callback is built on
the namespace whose Trainer asked, so a user's script of either import style is checked and none of our adapters is imported.
"""

import os
import sys
from typing import Any

from lightning_plugins._support.errors import InputError

LAUNCHED = "LIGHTNING_PLUGINS_LAUNCHED"


def for_pytorch_lightning() -> list[Any]:
    """Return the check for a Trainer of ``pytorch_lightning``, if several ranks were launched."""
    return _checks("pytorch_lightning")


def for_lightning() -> list[Any]:
    """Return the check for a Trainer of ``lightning.pytorch``, if several ranks were launched."""
    return _checks("lightning.pytorch")


def refuse_other_world_size(launched: int, expected: int) -> None:
    """Compare the number of launched processes with the Trainer's.

    Raises:
        InputError: if they differ.
    """
    if launched != expected:
        raise InputError(
            f"{launched} processes were launched, but the Trainer expects {expected} (devices times num_nodes); "
            "give the Trainer devices= and num_nodes= as launched, or change --nproc-per-node and --nnodes"
        )


def _checks(namespace: str) -> list[Any]:
    if LAUNCHED not in os.environ:
        return []

    def setup(self: Any, trainer: Any, pl_module: Any, stage: str) -> None:
        refuse_other_world_size(int(os.environ["WORLD_SIZE"]), trainer.world_size)

    base: Any = sys.modules[namespace].Callback
    return [type("WorldSizeCheck", (base,), {"setup": setup, "__doc__": refuse_other_world_size.__doc__})()]
