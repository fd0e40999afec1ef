"""The benchmarks that kill, in their short form, and the judge of what a new start has loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def kills(monkeypatch):
    """The module of the killed training, as the script beside it imports it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _memory_checkpoint_kills

    return _memory_checkpoint_kills


def trained(kills, steps):
    module = kills.Counted(state_mb=0.01)
    optimizer = module.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        (-torch.stack([tensor.sum() for tensor in module.tensors]).sum()).backward()
        optimizer.step()
    return module, optimizer


def test_every_tensor_tells_its_step(kills):
    for steps in (1, 2, 7, 300):
        assert kills.steps_inside(*trained(kills, steps)) == {steps}


def test_one_number_of_another_step_is_seen(kills):
    module, optimizer = trained(kills, 5)
    with torch.no_grad():
        module.tensors[3][1] = 4 * 5 / 2
    assert kills.steps_inside(module, optimizer) == {4, 5}
    module, optimizer = trained(kills, 5)
    optimizer.state[module.tensors[2]]["momentum_buffer"][0] = -6
    assert kills.steps_inside(module, optimizer) == {5, 6}


@pytest.mark.parametrize("number", [7.5, 8.0, float("nan"), float("inf"), -1.0])
def test_a_number_of_no_step_is_seen(kills, number):
    module, optimizer = trained(kills, 5)
    with torch.no_grad():
        module.tensors[0][0] = number
    assert None in kills.steps_inside(module, optimizer)
    assert None in kills.steps_inside(module, torch.optim.SGD(module.parameters())), "no momentum at all"


def short(name, *options):
    """Run a benchmark in its short form and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "LIGHTNING_PLUGINS_NAMESPACE": "pytorch_lightning"}
    command = [sys.executable, str(BENCHMARKS / name), "--tiny", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_kills():
    said = short("memory_checkpoint_kills.py", "--methods", "VerifiedCheckpointIO", "MemoryCheckpoint")
    rows = {line.split()[0]: line.split()[1:5] for line in said.splitlines() if line.startswith(("Verified", "Memory"))}
    assert rows == {name: ["2", "0", "0", "0"] for name in ("VerifiedCheckpointIO", "MemoryCheckpoint")}


def test_recovery():
    assert "lightning run: recovered" in short("memory_checkpoint_recovery.py")
