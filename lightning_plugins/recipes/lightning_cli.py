"""Lightning's own CLI for recipes and plain YAML files: into one run folder, on the launched ranks, with one-sentence refusals.

``RecipeCLI`` differs from ``LightningCLI`` in four things: everything goes to the run folder (also the configuration, written
whole and written again on resume), ``trainer.devices`` and ``num_nodes`` follow the launch, an option is never guessed from an
abbreviation, and whatever the YAML got wrong is an `InputError` of one sentence instead of jsonargparse's nested report.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_plugins._lightning import CSVLogger, LightningCLI, LightningModule, SaveConfigCallback, Trainer, submodule
from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError, as_input_error, one_line
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.checkpoints import last_checkpoint
from lightning_plugins.recipes.yaml_errors import innermost, parsing_sentence


class _SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run folder, whole or not at all."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        with atomic_write(Path(trainer.default_root_dir) / "config.yaml", "w") as file:
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
        return super().instantiate_trainer(**kwargs)


@contextmanager
def refusals(errors: tuple[type[Exception], ...] = (ValueError, TypeError)) -> Iterator[None]:
    """Turn what a constructor or Lightning refuses into an `InputError` with the innermost cause's own words.

    Args:
        errors: kinds of exception that mean a refusal; Lightning's ``MisconfigurationException`` always does.

    Raises:
        InputError: the refusal. Other exceptions pass unchanged: they are defects.
    """
    misconfiguration = submodule("utilities.exceptions").MisconfigurationException
    try:
        yield
    except Exception as error:
        if as_input_error(error) is not None:
            raise
        cause = innermost(error)
        if isinstance(cause, misconfiguration):
            raise InputError(f"Lightning refuses these settings: {one_line(str(cause))}; change them under trainer:") from error
        if isinstance(cause, errors):
            raise InputError(one_line(str(cause))) from error
        raise


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
        path: the YAML.
        options: further options, which win over the YAML.
        folder: the run folder.
        resume: go on from the newest checkpoint in the run folder, if there is one.

    Raises:
        InputError: if the YAML or an option is wrong.
    """
    cli = RecipeCLI(folder, ["--config", str(path), *options])
    checkpoint = last_checkpoint(folder.path) if resume else None
    with refusals(errors=()):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
        is_overridden = submodule("utilities.model_helpers").is_overridden
        if cli.datamodule is not None and is_overridden("val_dataloader", cli.datamodule):
            cli.trainer.validate(cli.model, datamodule=cli.datamodule)
