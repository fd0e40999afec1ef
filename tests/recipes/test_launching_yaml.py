"""A YAML through `lightning run` and `validate` in one process, with a real Trainer; what is wrong with it, in one sentence."""

import os
import signal
import sys

import pytest
import yaml

from lightning_plugins.cli import main
from tests.recipes.parts import write_parts
from tests.recipes.programs import only_run

pytestmark = pytest.mark.adapter


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory of its own; import path, modules and environment are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("LIGHTNING_PLUGINS_NAMESPACE", os.environ.get("LIGHTNING_PLUGINS_NAMESPACE", "pytorch_lightning"))
    monkeypatch.delitem(sys.modules, "parts", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)
    sys.modules.pop("parts", None)


def rows(path):
    return [line.split(",") for line in path.read_text().splitlines()]


def test_a_yaml_is_fitted_validated_and_gone_on_with(folder, capsys):
    write_parts(folder)
    assert main(["run", "boring.yaml", "--data.size", "12"]) == 0
    path = only_run(folder, "boring")
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    assert (path / "rank-0-0").read_text() == "1 1 0 0\n"
    saved = yaml.safe_load((path / "config.yaml").read_text())
    assert saved["data"]["init_args"]["size"] == 12
    assert saved["trainer"]["default_root_dir"] == str(path)
    header, *_ = rows(path / "logs" / "version_0" / "metrics.csv")
    assert "val_loss" in header

    # As if it had been killed after its checkpoint, with more epochs to go: the newest readable checkpoint is taken, and the
    # configuration that the run saved itself, whatever has become of the YAML that it was started with.
    (first,) = path.rglob("*.ckpt")
    first.with_name("epoch=9-step=99.ckpt").write_bytes(b"PK half a checkpoint")
    (path / "run.json").write_text((path / "run.json").read_text().replace('"run"', ""))
    (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("max_epochs: 1", "max_epochs: 3"))
    (folder / "boring.yaml").write_text("model: edited")
    with pytest.warns(UserWarning, match=r"step=99.ckpt is no readable checkpoint") as warned:
        assert main(["run", "--resume", str(path)]) == 0
    assert [f"the run goes on from {first}, at step 3" in str(warning.message) for warning in warned].count(True) == 1
    assert (path / "rank-0-0").read_text() == "1 1 1 3\n"
    saved = yaml.safe_load((path / "config.yaml").read_text())
    assert (saved["trainer"]["max_epochs"], saved["data"]["init_args"]["size"]) == (3, 12)


def test_validate_builds_everything_and_runs_nothing(folder, capsys):
    write_parts(folder)
    assert main(["validate", "boring.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "OK"
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["boring.yaml", "parts.py"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data.sise", "3"], "unknown option --data.sise; did you mean --data.size"),
        (["--data.init_args.sise=3"], "unknown option --data.sise; did you mean --data.size"),
        (["--trainer.max_epoch=3"], "unknown option --trainer.max_epoch; did you mean --trainer.max_epochs"),
        (["--wibble=3"], "unknown option --wibble; valid are --config, --data, --lr_scheduler, --model"),
        (["wibble"], "unexpected word 'wibble'; options start with --"),
        (["--data.size=many"], "data.size must be int, got many"),
        (["--trainer.max_epochs=x"], "trainer.max_epochs must be int or null, got x"),
        (["--model.width=0"], "width must be 1 or more, got 0"),
        (["--trainer.accelerator=gpus"], "You selected an invalid accelerator name"),
        (["--trainer.strategy=wibble"], "You selected an invalid strategy name"),
        (
            ["--trainer.devices=2"],
            "trainer.devices is 2 and trainer.num_nodes is 1, but one process was launched; start it with --nproc",
        ),
        (["--trainer.num_nodes=2"], "start it with --nproc-per-node 1 --nnodes 2"),
        (["--model=parts.Borin"], "model names parts.Borin: module 'parts' has no attribute 'Borin'"),
        (["--model=nowhere.Borin"], "model names nowhere.Borin: No module named 'nowhere'"),
        (["--model=parts.Noise"], "model names parts.Noise, which is no LightningModule of"),
        (["--model=lightning_plugins.PanoramicDept"], "lightning_plugins has no 'PanoramicDept'; it has"),
    ],
)
def test_a_wrong_option_is_one_sentence(folder, capsys, options, sentence):
    write_parts(folder)
    assert main(["run", "boring.yaml", *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lightning: ")
    assert sentence in last
    assert list((folder / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(wibble=3), "unknown key wibble; valid are data, lr_scheduler, model"),
        (lambda c: c["trainer"].update(max_epoch=3), "unknown key trainer.max_epoch; did you mean trainer.max_epochs"),
        (lambda c: c["data"]["init_args"].update(sise=3), "unknown key data.sise; did you mean data.size"),
        (lambda c: c["data"]["init_args"].update(size="many"), "data.size must be int, got many"),
        (lambda c: c["model"].update(init_args={"width": -1}), "width must be 1 or more, got -1"),
        (lambda c: c.pop("model"), "model is missing; give it in the YAML or as --model"),
        (
            lambda c: c["trainer"].update(callbacks=[{"class_path": "ModelCheckpoint", "init_args": {"moniter": "x"}}]),
            "unknown key trainer.callbacks.moniter; did you mean trainer.callbacks.monitor",
        ),
        (lambda c: c["trainer"].update(accelerator="cuda"), "Lightning refuses these settings: "),
    ],
)
def test_a_wrong_yaml_is_one_sentence(folder, capsys, change, sentence):
    write_parts(folder, change=change)
    assert main(["validate", "boring.yaml"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lightning: ")
    assert sentence in last


def test_a_defect_of_a_constructor_is_not_called_a_wrong_option(folder, capsys):
    write_parts(folder)
    assert main(["run", "boring.yaml", "--model.defect", "true"]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert "AttributeError: a defect in the constructor" in errors


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        ("training", "ValueError: a defect in the training step"),
        ("validation", "ValueError: a defect in the validation step"),
        ("logging", "MisconfigurationException: Only `self.log(..., reduce_fx={min,max,mean,sum})` are supported"),
    ],
)
def test_a_defect_in_a_step_keeps_its_traceback(folder, capsys, breaks, words):
    write_parts(folder)
    assert main(["run", "boring.yaml", "--model.breaks", breaks]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert words in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--trainer.val_check_interval=1000"], "`val_check_interval` (1000) must be less than or equal to the number of"),
        (["--trainer.max_epochs=-2"], "`max_epochs` must be a non-negative integer or -1"),
        (["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=wibble"], "Early stopping conditioned on metric"),
        (["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=wibble"], "could not find the monitored key"),
    ],
)
def test_what_lightning_refuses_while_it_fits_is_one_sentence(folder, capsys, options, sentence):
    write_parts(folder)
    assert main(["run", "boring.yaml", *options]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("lightning: Lightning refuses these settings: ")
    assert sentence in errors.splitlines()[-1]


def test_our_own_classes_are_found_by_their_public_path(folder, capsys):
    write_parts(folder, change=lambda c: c.update(data={"class_path": "lightning_plugins.RenderedRooms"}))
    assert main(["validate", "boring.yaml"]) == 0


def test_help_leaves_no_folder(folder, capsys):
    write_parts(folder)
    assert main(["run", "boring.yaml", "--help"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("devices", "num_nodes", "environ", "expected"),
    [
        ("auto", 1, {}, (1, 1)),
        (-1, 1, {}, (1, 1)),
        ([1], 1, {}, ([1], 1)),
        ("1,", 1, {}, ("1,", 1)),
        ("auto", 1, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, (2, 3)),
        (4, 8, {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_devices_follow_the_launch(devices, num_nodes, environ, expected):
    from lightning_plugins.recipes.lightning_cli import launched_devices

    assert launched_devices(devices, num_nodes, environ) == expected


@pytest.mark.parametrize(("devices", "count"), [("0,1", 2), ("0, 2, 3,", 3), ([0, 1], 2), ("2", 2)])
def test_several_devices_for_one_process_are_refused(devices, count):
    from lightning_plugins._support.errors import InputError
    from lightning_plugins.recipes.lightning_cli import launched_devices

    with pytest.raises(InputError, match=f"one process was launched; start it with --nproc-per-node {count}$"):
        launched_devices(devices, 1, {})


def test_the_newest_readable_checkpoint_is_found(tmp_path):
    import torch

    from lightning_plugins.recipes.checkpoints import last_checkpoint

    assert last_checkpoint(tmp_path) is None
    for name, step in (("a", 20), ("z", 3), ("epoch=7", 12)):
        torch.save({"global_step": step, "state_dict": {"w": torch.zeros(3)}}, tmp_path / f"{name}.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "later.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save([1], tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match="is no readable checkpoint") as warned:
        assert last_checkpoint(tmp_path) == tmp_path / "a.ckpt"
    assert len(warned) == 4
    assert f"the run goes on from {tmp_path / 'a.ckpt'}, at step 20" in str(warned[-1].message)
