"""`lightning run --nproc-per-node 2`: torchrun's agent with preloaded workers, real ranks, restarts, refusals."""

import os
import signal

import pytest
import yaml

from tests.recipes.parts import write_parts
from tests.recipes.programs import lightning, only_run, signalled

TWO = ("--nproc-per-node", "2")
STYLE = {"LIGHTNING_PLUGINS_NAMESPACE": os.environ.get("LIGHTNING_PLUGINS_NAMESPACE", "pytorch_lightning")}


def test_two_ranks_share_one_folder_and_started_again_go_on_after_the_last_epoch(tmp_path):
    # A wrong number of devices in the YAML gives way to the launch.
    write_parts(tmp_path, change=lambda content: content["trainer"].update(devices=5, max_epochs=2))
    dies = ("--trainer.callbacks.dies=1",)
    done = lightning(tmp_path, "run", "boring.yaml", *TWO, "--max-restarts=1", *dies, **STYLE)
    assert done.returncode == 0, done.stderr
    path = only_run(tmp_path, "boring")
    assert done.stdout.splitlines()[-1] == str(path)
    assert done.stdout.count(str(path)) == 1
    seen = {f"rank-{rank}-{attempt}": (path / f"rank-{rank}-{attempt}").read_text() for rank in (0, 1) for attempt in (0, 1)}
    assert seen == {
        "rank-0-0": "2 2 0 0\n",
        "rank-1-0": "2 2 0 0\n",
        "rank-0-1": "2 2 1 1\n",
        "rank-1-1": "2 2 1 1\n",
    }, "world size, devices, first epoch and step of each rank and attempt"
    saved = yaml.safe_load((path / "config.yaml").read_text())
    assert (saved["trainer"]["devices"], saved["trainer"]["num_nodes"]) == (2, 1)


COUNTED = """
import os
def main(options, run, resume):
    (run.path / f"rank-{os.environ.get('RANK')}").write_text(os.environ.get("WORLD_SIZE", "1"))
"""


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ((), {"rank-0": "2", "rank-1": "2"}),
        (("--max-restarts", "1"), {"rank-0": "2", "rank-1": "2"}),
        (("--nproc-per-node", "1"), {"rank-None": "1"}),
    ],
)
def test_a_recipe_that_needs_two_processes_starts_them_unless_told_otherwise(tmp_path, words, seen):
    (tmp_path / "mine.yaml").write_text("recipe: tiny\n")
    target = "mine" if words else "tiny"  # a copy of its YAML starts as many
    done = lightning(tmp_path, "run", "mine.yaml" if words else "tiny", *words, recipe=COUNTED, processes=2)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in only_run(tmp_path, target).glob("rank-*")} == seen


REFUSAL = """
import os
from lightning_plugins._support.errors import InputError
def main(options, run, resume):
    if os.environ["RANK"] == "1":
        try:
            raise InputError("rank 1 was given 2, valid is 1; give 1")
        except InputError as error:
            raise RuntimeError("the strategy failed") from error
"""


def test_what_one_rank_refuses_is_one_sentence(tmp_path):
    done = lightning(tmp_path, "run", "tiny", *TWO, recipe=REFUSAL)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "lightning: rank 1 was given 2, valid is 1; give 1"
    assert "Traceback" not in done.stderr
    assert "ChildFailedError" not in done.stderr


DEFECT = """
import os, time
def main(options, run, resume):
    (run.path / f"rank-{os.environ['RANK']}").write_text(os.environ["WORLD_SIZE"])
    print("ready", flush=True)
    if "--wait" in options:
        time.sleep(30)
    if os.environ["RANK"] == "0":
        time.sleep(30)
    while not (run.path / "rank-0").exists():
        time.sleep(0.01)
    raise KeyError("a defect of rank 1")
"""


def test_a_defect_of_one_rank_ends_all_with_its_traceback(tmp_path):
    done = lightning(tmp_path, "run", "tiny", *TWO, recipe=DEFECT)
    assert done.returncode == 1
    assert "in main" in done.stderr
    assert done.stderr.splitlines()[-1] == "KeyError: 'a defect of rank 1'"
    path = only_run(tmp_path, "tiny")
    assert [(path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


def test_a_signal_ends_the_ranks_with_the_line_that_resumes(tmp_path):
    code, _, errors = signalled(tmp_path, signal.SIGTERM, "run", "tiny", "--wait", *TWO, recipe=DEFECT)
    assert code == 143
    assert errors.splitlines()[-1] == f"stopped; to go on: lightning run --resume {only_run(tmp_path, 'tiny')} --nproc-per-node 2"


# Rank 0 trains with one Lightning, rank 1 with the other, and each believes to be alone.
MISMATCHED = """
import os, sys
from importlib import import_module
import torch
namespace = ("pytorch_lightning", "lightning.pytorch")[int(os.environ["RANK"])]
lightning = import_module(namespace)

class Boring(lightning.LightningModule):
    def training_step(self, batch, batch_idx):
        raise AssertionError("it trains")
    def configure_optimizers(self):
        return None
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))

try:
    lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False).fit(Boring())
except ValueError as error:
    with open(namespace, "w") as file:
        print(error, "lightning_plugins._lightning" in sys.modules, file=file)
    sys.exit(5)
"""


def test_a_script_whose_trainer_expects_another_world_size_stops_at_once(tmp_path):
    (tmp_path / "my.py").write_text(MISMATCHED)
    done = lightning(tmp_path, "run", "my.py", *TWO)
    assert done.returncode == 5, done.stderr
    texts = [(tmp_path / name).read_text() for name in ("pytorch_lightning", "lightning.pytorch") if (tmp_path / name).exists()]
    assert texts
    for text in texts:
        assert text.startswith("2 processes were launched, but the Trainer expects 1 (devices times num_nodes); ")
        assert text.endswith(" False\n")
