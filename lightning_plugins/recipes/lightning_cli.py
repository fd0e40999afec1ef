"""Lightning's own CLI for recipes and plain YAML files: into one run folder, on the launched ranks, with one-sentence refusals.

``RecipeCLI`` differs from ``LightningCLI`` in six things: everything goes to the run folder (also the configuration, written
whole and written again on resume), ``trainer.devices`` and ``num_nodes`` follow the launch, an option is never guessed from an
abbreviation, whatever the YAML got wrong is an `InputError` of one sentence instead of jsonargparse's nested report, each Trainer
gets instances of its own of all that is configured for it, and it writes its checkpoints whole or not at all.
"""

import os
from pathlib import Path
from typing import Any

from lightning_plugins._lightning import (
    CSVLogger,
    LightningCLI,
    LightningModule,
    SaveConfigCallback,
    TorchCheckpointIO,
    Trainer,
    submodule,
)
from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import CONFIG_FILE, RunFolder
from lightning_plugins.recipes._seams import instantiate_key
from lightning_plugins.recipes.checkpoints import last_checkpoint
from lightning_plugins.recipes.refusals import fit_refusals, refusals
from lightning_plugins.recipes.yaml_errors import parsing_sentence
from lightning_plugins.strategies.atomic_checkpoint import AtomicCheckpointIO


class _SaveConfig(SaveConfigCallback):
    """Write the whole configuration into the run folder, whole or not at all."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        with atomic_write(Path(trainer.default_root_dir) / CONFIG_FILE, "w") as file:
            file.write(text)


class RecipeCLI(LightningCLI):
    """Parse a recipe's options and build its model, data module and Trainer, ready to be used: nothing is run.

    A recipe with options of its own overrides ``add_arguments_to_parser``.

    Args:
        folder: the run folder; the Trainer's ``default_root_dir``.
        options: the command line, ``--config FILE`` included.
        **cli_arguments: further arguments of ``LightningCLI``, such as ``model_class``.

    Raises:
        InputError: if an option or a value in the YAML is wrong, or a constructor refuses it.
    """

    def __init__(self, folder: RunFolder, options: list[str], **cli_arguments: Any) -> None:
        self.folder = folder
        with refusals():
            super().__init__(
                args=options,
                run=False,
                save_config_callback=_SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
                **cli_arguments,
            )

    def add_default_arguments_to_parser(self, parser: Any) -> None:
        super().add_default_arguments_to_parser(parser)
        parser.add_argument("--recipe", type=str | None, default=None, help="the recipe that this YAML belongs to")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except Exception as error:
            raise InputError(parsing_sentence(error, parser, args)) from error

    def before_instantiate_classes(self) -> None:
        trainer = self.config["trainer"]
        trainer["default_root_dir"] = str(self.folder.path)
        trainer["devices"], trainer["num_nodes"] = launched_devices(trainer["devices"], trainer["num_nodes"], os.environ)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config["trainer"]["logger"] is None:
            kwargs.setdefault("logger", CSVLogger(self.folder.path, name="logs"))
        trainer = super().instantiate_trainer(**kwargs)
        plugins = self.config_init["trainer"]["plugins"] or []
        configured = any(
            isinstance(plugin, TorchCheckpointIO) for plugin in (plugins if isinstance(plugins, list) else [plugins])
        )
        # What the user configured, or a strategy that has its own way of writing, is left alone.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO and not configured:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def another_trainer(self, callbacks: list[Any], method: str, **settings: Any) -> Trainer:
        """Return a Trainer as configured, sharing no callback, plugin or strategy with any other.

        Args:
            callbacks: further ones, after the user's own.
            method: what is trained, the first half of its log keys; a callback of the user's that monitors another's is left out.
            **settings: arguments of the Trainer that replace the configured ones.

        Raises:
            InputError: if a constructor refuses its arguments.
        """
        with refusals():
            fresh = instantiate_key(self.parser, self.config, "trainer")
            own = fresh.callbacks if isinstance(fresh.callbacks, list) else [fresh.callbacks] if fresh.callbacks else []
            self.config_init["trainer"] = fresh
            own = [callback for callback in own if _concerns(callback, method)]
            return self.instantiate_trainer(callbacks=[*own, *callbacks], **settings)


def _concerns(callback: Any, method: str) -> bool:
    monitored = getattr(callback, "monitor", None)
    return not isinstance(monitored, str) or "/" not in monitored or monitored.startswith(f"{method}/")


def launched_devices(devices: Any, num_nodes: int, environ: Any) -> tuple[Any, int]:
    """Return the Trainer's ``devices`` and ``num_nodes`` for the processes that were launched.

    Args:
        devices: as configured; with one process "auto" means one device.
        num_nodes: as configured; with one process it must be 1.
        environ: the environment: torchrun's agent sets WORLD_SIZE and LOCAL_WORLD_SIZE.

    Raises:
        InputError: if several devices are configured, but one process was launched.
    """
    if "LOCAL_WORLD_SIZE" in environ:
        here = int(environ["LOCAL_WORLD_SIZE"])
        return here, int(environ["WORLD_SIZE"]) // here
    if devices in ("auto", -1, "-1"):
        devices = 1
    if isinstance(devices, str) and "," in devices:
        count = len([device for device in devices.split(",") if device.strip()])
    else:
        count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    if count * num_nodes > 1:
        raise InputError(
            f"trainer.devices is {devices} and trainer.num_nodes is {num_nodes}, but one process was launched; "
            f"start it with --nproc-per-node {count}{f' --nnodes {num_nodes}' if num_nodes > 1 else ''}"
        )
    return devices, num_nodes


def run_yaml(path: Path, options: list[str], folder: RunFolder, resume: bool) -> None:
    """Fit what a YAML describes, then validate it if its data module has validation data.

    Args:
        path: the YAML; on resume the run's own ``config.yaml``.
        options: further options, which win over the YAML.
        folder: the run folder.
        resume: go on from the newest checkpoint in the run folder, if there is one.

    Raises:
        InputError: if the YAML or an option is wrong.
    """
    cli = RecipeCLI(folder, ["--config", str(path), *options])
    checkpoint = last_checkpoint(folder.path) if resume else None
    with fit_refusals(cli.trainer):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
        is_overridden = submodule("utilities.model_helpers").is_overridden
        if cli.datamodule is not None and is_overridden("val_dataloader", cli.datamodule):
            cli.trainer.validate(cli.model, datamodule=cli.datamodule)
