"""One phase of a recipe: a training that goes on at its last finished epoch, and what its Trainer's options may be."""

from typing import Any

from lightning_plugins._lightning import ModelCheckpoint, seed_everything
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.checkpoints import last_checkpoint
from lightning_plugins.recipes.lightning_cli import RecipeCLI
from lightning_plugins.recipes.refusals import fit_refusals
from lightning_plugins.recipes.run_loggers import RunLoggers


def fit_phase(
    cli: RecipeCLI,
    run: RunFolder,
    phase: str,
    module: Any,
    method: str,
    datamodule: Any,
    epochs: int | None,
    loggers: RunLoggers,
    callbacks: list[Any],
) -> None:
    """Train, from the phase's last finished epoch if there is one, and write ``<phase>.ckpt``.

    Args:
        cli: the recipe's options, with the Trainer's.
        run: the run's folder; the phase is marked there when it is finished.
        phase: its name.
        module: a LightningModule with ``deploy(path)``, which writes what inference needs.
        method: first half of the module's log keys.
        datamodule: what it is trained on.
        epochs: of the training; None leaves the Trainer's own limit.
        loggers: of the run.
        callbacks: beside the user's own and the one that keeps checkpoints.
    """
    folder = run.path / "checkpoints" / phase
    # The two newest, so that one is left if a failing disk has damaged the other.
    keep = ModelCheckpoint(
        folder,
        filename="{epoch}",
        monitor="step",
        mode="max",
        save_top_k=2,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    trainer = cli.another_trainer([*callbacks, keep], method, max_epochs=epochs, logger=loggers.of_phase(phase))
    seed_everything(cli.config.seed_everything, workers=True, verbose=False)
    with fit_refusals(trainer):
        trainer.fit(module, datamodule, ckpt_path=last_checkpoint(folder))
    if trainer.is_global_zero:
        module.deploy(run.path / f"{phase}.ckpt")
        run.finish(phase)
    trainer.strategy.barrier()


def check_trainer(options: Any) -> None:
    """Refuse numbers without a training, and a logger that cannot act.

    Args:
        options: the ``trainer`` part of a recipe's configuration.

    Raises:
        InputError: in one sentence.
    """
    if options.max_epochs is not None and options.max_epochs < 1:
        raise InputError(f"trainer.max_epochs must be 1 or more, got {options.max_epochs}; to train nothing: --ckpt FILE")
    if options.max_steps < 1 and options.max_steps != -1:
        raise InputError(f"trainer.max_steps must be 1 or more, got {options.max_steps}; -1 is no limit but the epochs")
    if options.logger is not None:
        raise InputError(
            f"trainer.logger cannot act, got {options.logger}: the recipe writes metrics.csv and one W&B run over all phases; "
            "leave it out, and choose the latter with --wandb offline, online or disabled"
        )
