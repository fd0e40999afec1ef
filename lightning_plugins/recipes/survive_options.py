"""The options of the recipe ``survive``, and what they refuse before the first step."""

from collections.abc import Mapping
from typing import Any, Literal

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.lightning_cli import RecipeCLI
from lightning_plugins.recipes.survive_learner import STEPS_PER_EPOCH, Learner
from lightning_plugins.recipes.targets import shipped_yaml

# What the recipe decides itself, what a Trainer has when nobody decided, and what to do instead.
_OWN = {
    "max_steps": (-1, "use --epochs"),
    "max_epochs": (None, "use --epochs"),
    "logger": (None, "use --wandb"),
    "strategy": ("auto", "leave it out"),
    "accumulate_grad_batches": (1, "leave it out"),
    "limit_train_batches": (None, "use --epochs"),
    "fast_dev_run": (False, "use --epochs 1 --kills 1"),
}
# Lowest and highest value.
_RANGES = {"processes": (1, 16), "kills": (0, 100), "epochs": (1, 1000), "capture_every": (1, 10_000)}


def learner() -> Learner:
    """Return the module that is trained, to be looked at."""
    return Learner(processes=1, epochs=1)


class CLI(RecipeCLI):
    """The options: the Trainer's, and these.

    Attributes:
        steps: optimizer steps of a whole training.
    """

    def __init__(self, folder: RunFolder, options: list[str]) -> None:
        super().__init__(folder, ["--config", str(shipped_yaml("survive")), *options], model_class=learner)
        knobs = self.config
        for name, (lowest, highest) in _RANGES.items():
            if not lowest <= knobs[name] <= highest:
                raise InputError(f"{name} must be {lowest} to {highest}, got {knobs[name]}; leave it out for the recipe's own")
        if type(knobs.seed_everything) is not int or knobs.seed_everything < 0:
            raise InputError(
                f"seed_everything must be a number from 0 on, got {knobs.seed_everything}; two runs are compared that start alike"
            )
        for name, (default, instead) in _OWN.items():
            if knobs.trainer[name] != default:
                raise InputError(f"trainer.{name} cannot act, got {knobs.trainer[name]}: the recipe sets it; {instead}")
        self.steps = knobs.epochs * STEPS_PER_EPOCH

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--processes", type=int, default=2, help="that train together")
        parser.add_argument("--kills", type=int, default=3, help="SIGKILLs of a process that is drawn, at moments that are drawn")
        parser.add_argument("--epochs", type=int, default=8, help=f"of {STEPS_PER_EPOCH} steps")
        parser.add_argument("--capture_every", type=int, default=10, help="optimizer steps between two captures")
        parser.add_argument("--wandb", type=Literal["offline", "online", "disabled"], default="offline", help="the W&B run")


def refuse_launched(environment: Mapping[str, str]) -> None:
    """Refuse to be one of several processes that somebody else has started.

    Args:
        environment: of this process; torchrun's agent sets ``LOCAL_WORLD_SIZE``.

    Raises:
        InputError: if an agent has started it.
    """
    if "LOCAL_WORLD_SIZE" in environment:
        raise InputError(
            "survive starts its processes, and starts them again, by itself, but was given options of the launch such as "
            "--nproc-per-node or --max-restarts; leave them out and use --processes and --kills"
        )
