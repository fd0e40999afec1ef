"""The options of the recipe ``ok_topk_compare``, and what they refuse before the first step."""

from typing import Any, Literal

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.engines.sparse_allreduce.hook_options import HookOptions
from lightning_plugins.recipes.communication_contestants import CONTESTANTS, SPARSE, make_strategy
from lightning_plugins.recipes.communication_fit import Learner
from lightning_plugins.recipes.communication_tasks import BATCH, TASKS
from lightning_plugins.recipes.lightning_cli import RecipeCLI
from lightning_plugins.recipes.targets import shipped_yaml

DENSITY = 0.02
# What the recipe decides itself, what a Trainer has when nobody decided, and what to use instead.
_OWN = {
    "max_steps": (-1, "--steps"),
    "max_epochs": (None, "--steps"),
    "logger": (None, "--wandb"),
    "strategy": ("auto", "--contestants"),
    "accumulate_grad_batches": (1, "--steps"),
}


def learner() -> Learner:
    """Return a module of a task, to be looked at."""
    return Learner(next(iter(TASKS)), 0)


class CLI(RecipeCLI):
    """The options: the Trainer's, and these.

    Attributes:
        tasks: names of those that are trained.
        contestants: names of those that are compared.
    """

    def __init__(self, folder: RunFolder, options: list[str]) -> None:
        defaults = ["--config", str(shipped_yaml("ok_topk_compare"))]
        super().__init__(folder, [*defaults, *options], model_class=learner)
        self.tasks = self._chosen("tasks", TASKS)
        self.contestants = self._chosen("contestants", CONTESTANTS)
        self._check()

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--tasks", type=list[str] | None, default=None, help="what is trained; all by default")
        parser.add_argument("--contestants", type=list[str] | None, default=None, help="who takes part; all by default")
        parser.add_argument("--density", type=float, default=DENSITY, help="share of the gradient that Ok-Topk sends")
        parser.add_argument("--steps", type=int, default=200, help="of every contestant on every task")
        parser.add_argument("--evaluate_every", type=int, default=10, help="steps between two evaluations")
        parser.add_argument("--wandb", type=Literal["offline", "online", "disabled"], default="offline", help="the W&B run")

    def check_processes(self) -> None:
        """Refuse a number of processes with which nothing can be compared; not for ``lightning validate``, which is one.

        Raises:
            InputError: for one process, more than there are examples in a batch, or than entries that are sent.
        """
        ranks = self.trainer.world_size
        if not 2 <= ranks <= BATCH:
            raise InputError(
                f"ok_topk_compare compares what processes send to each other and needs 2 to {BATCH}, got {ranks}; "
                "leave out --nproc-per-node, or give it 2 or 4"
            )
        if any(name in SPARSE for name in self.contestants):
            for task in self.tasks:
                elements = sum(parameter.numel() for parameter in Learner(task, 0).parameters())
                HookOptions(self.config.density).elements_sent(elements, ranks)

    def _chosen(self, option: str, known: dict[str, Any]) -> list[str]:
        names = list(dict.fromkeys(known if self.config[option] is None else self.config[option]))
        if not names:
            raise InputError(f"{option} is an empty list; name some of {', '.join(known)}, or leave it out for all")
        for name in names:
            if name not in known:
                raise InputError(f"there is no {name!r} among the {option}; {nearest(name, known)}")
        return names

    def _check(self) -> None:
        knobs = self.config
        for name in ("steps", "evaluate_every"):
            if knobs[name] < 1:
                raise InputError(f"{name} must be 1 or more, got {knobs[name]}; leave it out for the recipe's own")
        if type(knobs.seed_everything) is not int or knobs.seed_everything < 0:
            raise InputError(f"seed_everything must be a number from 0 on, got {knobs.seed_everything}; it makes the batches")
        for name, (default, instead) in _OWN.items():
            if knobs.trainer[name] != default:
                raise InputError(f"trainer.{name} cannot act, got {knobs.trainer[name]}: the recipe sets it; use {instead}")
        for name in self.contestants:
            make_strategy(name, knobs.density)
        if knobs.density != DENSITY and not any(name in SPARSE for name in self.contestants):
            raise InputError(f"density cannot act, got {knobs.density}: neither of {', '.join(SPARSE)} takes part; leave it out")
