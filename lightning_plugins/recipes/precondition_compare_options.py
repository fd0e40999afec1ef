"""The options of the recipe ``precondition_compare``, and what they refuse before the first step."""

from typing import Any, Literal

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.comparison_fit import Contestant
from lightning_plugins.recipes.comparison_trials import CONTESTANTS, Trial, trials
from lightning_plugins.recipes.lightning_cli import RecipeCLI
from lightning_plugins.recipes.targets import shipped_yaml

# What the recipe decides itself, and what a Trainer has when nobody decided.
_OWN = {"max_steps": -1, "max_epochs": None, "logger": None}


def contestant(task: str = "deep_autoencoder") -> Contestant:
    """Return a module of the task, to be looked at.

    Args:
        task: ``deep_autoencoder`` or ``character_transformer``.
    """
    return Contestant(task, 0, Trial("sgd", 0.1))


class CLI(RecipeCLI):
    """The options: the Trainer's, and these."""

    def __init__(self, folder: RunFolder, options: list[str]) -> None:
        defaults = ["--config", str(shipped_yaml("precondition_compare"))]
        super().__init__(folder, [*defaults, *options], model_class=contestant)
        self.grids = self._grids()
        self._check()

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--task", type=str, default="deep_autoencoder", help="what is trained")
        parser.link_arguments("task", "model.task")
        parser.add_argument("--methods", type=list[str] | None, default=None, help="contestants; all by default")
        parser.add_argument("--steps", type=int, default=120, help="of every trial")
        parser.add_argument("--trials", type=int, default=3, help="settings of every contestant")
        parser.add_argument("--evaluate_every", type=int, default=5, help="steps between two evaluations")
        parser.add_argument("--wandb", type=Literal["offline", "online", "disabled"], default="offline", help="the W&B run")

    def _grids(self) -> dict[str, list[Trial]]:
        """Return the trials of every contestant; AdamW is first, if it takes part: the others are timed to its loss."""
        knobs = self.config
        names = dict.fromkeys(CONTESTANTS if knobs.methods is None else knobs.methods)
        grids = {name: trials(knobs.task, name, knobs.trials) for name in names}
        if not grids:
            raise InputError(f"methods is an empty list; name some of {', '.join(CONTESTANTS)}, or leave it out for all")
        return dict(sorted(grids.items(), key=lambda item: item[0] != "adamw"))

    def _check(self) -> None:
        knobs = self.config
        for name in ("steps", "evaluate_every"):
            if knobs[name] < 1:
                raise InputError(f"{name} must be 1 or more, got {knobs[name]}; leave it out for the recipe's own")
        if type(knobs.seed_everything) is not int or knobs.seed_everything < 0:
            raise InputError(f"seed_everything must be a number from 0 on, got {knobs.seed_everything}; it makes the batches")
        for name, default in _OWN.items():
            if knobs.trainer[name] != default:
                raise InputError(
                    f"trainer.{name} cannot act, got {knobs.trainer[name]}: the recipe sets it; use --steps or --wandb"
                )
        if self.trainer.world_size > 1:
            raise InputError(
                f"precondition_compare times its methods in one process, got {self.trainer.world_size}; leave out "
                "--nproc-per-node and --nnodes"
            )
