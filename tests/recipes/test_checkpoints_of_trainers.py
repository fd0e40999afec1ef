"""Every Trainer that a YAML or a recipe gets writes its checkpoints whole, shares nothing, and survives a disk that fills."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from lightning_plugins._lightning import TorchCheckpointIO
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.cli import main
from lightning_plugins.recipes.lightning_cli import RecipeCLI
from lightning_plugins.strategies.atomic_checkpoint import AtomicCheckpointIO
from tests.recipes.parts import write_parts

pytestmark = pytest.mark.adapter


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory to import from; import path, modules and environment are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("LIGHTNING_PLUGINS_NAMESPACE", os.environ.get("LIGHTNING_PLUGINS_NAMESPACE", "pytorch_lightning"))
    monkeypatch.delitem(sys.modules, "parts", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)
    sys.modules.pop("parts", None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB, and the function that gives it more."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    subprocess.run(["umount", "--lazy", disk], check=True)


def build(folder, *options):
    (folder / "run").mkdir(exist_ok=True)
    return RecipeCLI(RunFolder(folder / "run"), ["--config", str(write_parts(folder)), *options])


def test_each_trainer_has_instances_of_its_own(folder):
    cli = build(folder, "--trainer.strategy=SingleDeviceStrategy", "--trainer.strategy.device=cpu")
    trainers = [cli.trainer, cli.another_trainer([], "boring"), cli.another_trainer([], "boring", max_epochs=5)]
    notes = [callback for trainer in trainers for callback in trainer.callbacks if type(callback).__name__ == "Notes"]
    assert len(notes) == len({id(callback) for callback in notes}) == 3
    assert len({id(trainer.strategy) for trainer in trainers}) == 3
    assert [trainer.max_epochs for trainer in trainers] == [1, 1, 5]
    for trainer in trainers:
        assert sum(type(callback).__name__ == "ModelCheckpoint" for callback in trainer.callbacks) == 1
        assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


@pytest.mark.parametrize(("monitor", "kept"), [("boring/val_loss", True), ("teacher/val_loss", False), ("step", True)])
def test_a_callback_that_monitors_another_phase_is_left_out(folder, monitor, kept):
    cli = build(folder, "--trainer.callbacks=EarlyStopping", f"--trainer.callbacks.monitor={monitor}")
    names = [type(callback).__name__ for callback in cli.another_trainer([], "boring").callbacks]
    assert ("EarlyStopping" in names) is kept


def test_a_plugin_of_the_users_own_stays(folder):
    path = f"{TorchCheckpointIO.__module__}.TorchCheckpointIO"
    cli = build(folder, f"--trainer.plugins={path}")
    assert type(cli.trainer.strategy.checkpoint_io) is TorchCheckpointIO


def test_the_good_checkpoint_survives_a_disk_that_fills_and_the_run_goes_on(folder, small_disk, capsys):
    disk, resize = small_disk
    keep = {"class_path": "ModelCheckpoint", "init_args": {"filename": "last", "enable_version_counter": False}}

    def change(content):
        content["model"]["init_args"] = {"width": 20_000}  # 400 kB a checkpoint: one fits, a second beside it does not
        content["trainer"].update(max_epochs=3, callbacks=[*content["trainer"]["callbacks"], keep])

    write_parts(folder, change=change)
    assert main(["run", "boring.yaml", "--runs-dir", str(disk)]) == 2
    assert "free space" in capsys.readouterr().err.splitlines()[-1]
    (run,) = (disk / "boring").iterdir()
    (last,) = run.rglob("*.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert not list(run.rglob(".*")), "half-written files"

    resize("8m")
    assert main(["run", "--resume", str(run)]) == 0
    assert (run / "rank-0-0").read_text() == "1 1 1 2\n"
    newest = max(run.rglob("*.ckpt"), key=os.path.getmtime)
    assert torch.load(newest, weights_only=True)["global_step"] == 6
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 3
