"""`lightning ckpt`: what it lists, that no damage passes, and that an exported file is a checkpoint for everybody."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_plugins.engines.resilience.disk import write_step
from lightning_plugins.engines.resilience.disk_folder import claim, mark_ended
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import keeper_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def home(tmp_path):
    """A folder that stands for the user's: the keeper that is asked is the one in it."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    (tmp_path / "work").mkdir()
    return tmp_path


def ckpt(home, *words, preamble=""):
    """Run the command in ``work``."""
    program = f"{preamble}\nimport sys; from lightning_plugins.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, "ckpt", *map(str, words)],
        cwd=home / "work",
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(home / "runtime"), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def training_state(step):
    """What Lightning keeps, as MemoryCheckpoint has it written: the replicas' parameters, and the rest as a rank's own."""
    moments = {0: {"step": torch.tensor(float(step))}}
    own = {
        "epoch": 1,
        "global_step": step,
        "state_dict": {"mean": torch.ones(3)},
        "optimizer_states": [{"param_groups": [{"lr": 0.1, "params": [0]}]}],
        "loops": {"fit_loop": {"state_dict": {"combined_loader": [{"at": step}]}}},
        "exact_resume": {"batches": 2},
    }
    shared = {"state_dict": {"weight": torch.full((1000,), float(step))}, "optimizer_states": [moments]}
    return {"shared": shared, "rank0": own}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def disk(home):
    """A job's folder with the steps 10 and 20."""
    folder = home / "work" / "logs" / "steps"
    claim(folder, "my-run")
    for step in (10, 20):
        write_step(folder, step, training_state(step), {"world_size": 1})
    return folder


def test_ls_shows_disk_without_torch_and_starts_no_keeper(home, disk):
    (disk / "step-000000010" / "rank0.distcp").unlink()
    no_torch = "import sys; sys.modules['torch'] = None"
    done = ckpt(home, "ls", preamble=no_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert "In memory: nothing; no keeper of yours holds a job" in done.stdout
    assert "logs/steps  job my-run\n" in done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 20", "step 10"]
    assert lines[0].endswith(" old  complete")
    assert " kB  " in lines[0]
    assert "rank0.distcp is damaged: it cannot be read (No such file or directory)" in lines[1]
    assert os.listdir(home / "runtime") == []
    mark_ended(disk)
    assert "job my-run, ended cleanly" in ckpt(home, "ls", disk).stdout
    took_s = []
    for _ in range(3):
        start = time.perf_counter()
        ckpt(home, "ls")
        took_s.append(time.perf_counter() - start)
    assert min(took_s) < 0.5
    (home / "empty").mkdir()
    assert f"no steps in {home}/empty or below it" in ckpt(home, "ls", home / "empty").stdout


def test_ls_shows_memory(home):
    folder = home / "runtime" / "lightning-plugins"
    with KeeperClient("my-run/0", folder=folder) as client:
        client.capture("shared", pack({"a": torch.zeros(3_000_000)}), 10, {})
        client.wait_sealed("shared", 10, 10)
        done = ckpt(home, "ls")
        assert f"  job my-run/0  12.3 MB  keeper {client.keeper_pid}\n" in done.stdout
        assert re.search(r"\n    step 10  shards here: 1  \d s old  not committed by all ranks\n", done.stdout)
        client.commit("shared", 10)
        for shard in ("shared", "rank0"):
            client.capture(shard, pack({"a": torch.zeros(3)}), 20, {})
            client.wait_sealed(shard, 20, 10)
        client.commit("shared", 20)
        lines = [re.sub(r"\d s old", "", line) for line in ckpt(home, "ls").stdout.splitlines() if "shards here" in line]
        assert lines == ["    step 20  shards here: 2    committed", "    step 10  shards here: 1    committed"]
        client.end()
    deadline = time.monotonic() + 10
    while keeper_of(folder) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "In memory: nothing" in ckpt(home, "ls").stdout


def test_verify_finds_what_ls_cannot_see(home, disk):
    torch.save({"a": 1}, home / "work" / "plain.ckpt")
    done = ckpt(home, "verify", ".")
    assert (done.returncode, done.stderr) == (0, "")
    assert "plain.ckpt  has no checksum" in done.stdout
    assert done.stdout.endswith("3 whole, 0 damaged\n")
    flip(disk / "step-000000020" / "shared.distcp")
    assert "damaged" not in ckpt(home, "ls").stdout
    for given in (disk, disk / "step-000000020"):
        done = ckpt(home, "verify", given)
        assert (done.returncode, done.stderr) == (1, "")
        assert "shared.distcp is damaged: it differs in its chunk 0 of 1; use another copy or an older step" in done.stdout
        assert done.stdout.endswith(", 1 damaged\n")
    assert ckpt(home, "verify", disk / "step-000000010").stdout.endswith("  whole\n1 whole, 0 damaged\n")


def test_export_makes_an_ordinary_checkpoint_of_the_newest_whole_step(home, disk):
    done = ckpt(home, "export", disk, "--output", "new.ckpt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "new.ckpt\n", "")
    found = torch.load(home / "work" / "new.ckpt", weights_only=True)
    assert torch.equal(found["state_dict"].pop("weight"), torch.full((1000,), 20.0))
    assert torch.equal(found["state_dict"].pop("mean"), torch.ones(3))
    optimizer = {"state": {0: {"step": torch.tensor(20.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    loops = {"fit_loop": {"state_dict": {"combined_loader": [{"at": 20}]}}}
    rest = {"epoch": 1, "global_step": 20, "state_dict": {}, "optimizer_states": [optimizer], "loops": loops}
    assert found == rest
    assert ckpt(home, "verify", "new.ckpt").stdout.endswith("1 whole, 0 damaged\n")
    assert ckpt(home, "export", disk, "--step", "10", "--output", "old.ckpt").returncode == 0
    assert torch.load(home / "work" / "old.ckpt", weights_only=True)["global_step"] == 10
    flip(disk / "step-000000020" / "shared.distcp")
    done = ckpt(home, "export", disk, "--output", "next.ckpt")
    assert done.stdout.startswith("left out: ")
    assert torch.load(home / "work" / "next.ckpt", weights_only=True)["global_step"] == 10


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lst"], "there is no lightning ckpt 'lst'; did you mean ls?"),
        (["ls", "nowhere"], "there is no nowhere; give a folder that exists"),
        (["verify"], "the following arguments are required: DIR; see: lightning ckpt verify --help"),
        (["verify", "empty"], "empty holds no steps of MemoryCheckpoint and no .ckpt files"),
        (["export", "logs/steps"], "the following arguments are required: --output"),
        (["export", "empty", "--output", "a.ckpt"], "empty holds no steps of MemoryCheckpoint"),
        (["export", "logs/steps", "--step", "7", "--output", "a.ckpt"], "has no step 7; it has 20, 10"),
        (["export", "logs/steps", "--output", "none/a.ckpt"], "none/a.ckpt cannot be written (No such file or directory)"),
        (["export", "logs/steps", "--output", "there.ckpt"], "there.ckpt exists already and is not overwritten"),
        (["export", "logs/bad/step-000000010", "--output", "a.ckpt"], "shared.distcp is damaged: it differs"),
        (
            ["export", "logs/bad", "--step", "10", "--output", "a.ckpt"],
            "no step of logs/bad that was asked for is whole; it has 10",
        ),
    ],
)
def test_wrong_words_are_one_sentence(home, disk, words, sentence):
    (home / "work" / "empty").mkdir()
    (home / "work" / "there.ckpt").write_text("")
    (home / "work" / "logs" / "bad").mkdir()
    flip(write_step(home / "work" / "logs" / "bad", 10, training_state(10)) / "shared.distcp")
    done = ckpt(home, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert sentence in done.stderr
    assert not list((home / "work").glob(".*"))


def test_help(home):
    assert "usage: lightning ckpt COMMAND" in ckpt(home).stdout
    for word in ("ls", "verify", "export"):
        done = ckpt(home, word, "--help")
        assert done.returncode == 0
        assert f"lightning ckpt {word}" in done.stdout
