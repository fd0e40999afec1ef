"""The callback in a Trainer of one process: what it goes on from, what it leaves alone, and what it refuses."""

import logging
import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

from lightning_plugins import MemoryCheckpoint
from lightning_plugins._lightning import Callback, ModelCheckpoint
from lightning_plugins._support.errors import InputError
from lightning_plugins.callbacks.memory_checkpoint import job as jobs
from lightning_plugins.engines.resilience.disk_steps import step_folder, steps
from lightning_plugins.engines.resilience.keeper_client import KeeperClient, Writing
from tests.callbacks.memory_checkpoint.runs import Regression, memory, same, train
from tests.engines.resilience.keeper_parts import eventually

pytestmark = pytest.mark.adapter


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    """A keeper of this test's own, whose memory ends with it."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    jobs._fits.clear()
    with KeeperClient("held by the test") as client:
        yield client
        client.end()


class Crash(Callback):
    """Raises before a batch, counted over the epochs."""

    def __init__(self, before):
        self.before = before

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.before:
            raise KeyError("a fault")


def again(job):
    """Count fits from 0, as a script does that is started again."""
    jobs._fits.pop(job, None)


def crashed(job, before=9, lazy=False):
    """Train until a fault, and forget that this process has begun a fit."""
    with pytest.raises(KeyError, match="a fault"):
        train(memory(job, lazy=lazy), Crash(before))
    again(job)


def held(job, fit=0):
    with KeeperClient(f"{job}/{fit}") as client:
        return sorted((one.shard, one.step) for one in client.generations())


@pytest.mark.parametrize("lazy", [False, True])
def test_a_crashed_run_goes_on_with_the_same_bits_and_gives_its_memory_back(lazy):
    whole = train()
    crashed("a", lazy=lazy)
    assert {step for _, step in held("a")} == {6, 8}
    found = train(memory(lazy=lazy), seed=99)
    assert same(whole, found) == []
    assert len(found["seen"]) == len(whole["seen"]) - 8
    assert held("a") == []


def test_a_run_that_ended_is_not_gone_on_from():
    train(memory())
    again("a")
    assert len(train(memory())["seen"]) == 18


def test_the_second_fit_of_a_script_is_another_one():
    """The first ended; after a crash in the second the script runs the first again, and goes on in the second."""
    whole = train(memory()), train(memory(), seed=4)
    again("a")
    assert same(whole[0], train(memory())) == []
    with pytest.raises(KeyError):
        train(memory(), Crash(9), seed=4)
    again("a")
    assert same(whole[0], train(memory())) == []
    second = train(memory(), seed=4)
    assert same(whole[1], second) == []
    assert len(second["seen"]) == 10


def test_a_named_checkpoint_wins(tmp_path, caplog):
    crashed("a")
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
    train(saving, enable_checkpointing=True)
    path = next(tmp_path.glob("step=6*.ckpt"))
    with pytest.warns(UserWarning, match="left aside what memory held of this job: fit was given ckpt_path="):
        found = train(memory(), ckpt_path=str(path))
    assert found["seen"][0][:2] == (1, 0)
    assert len(found["seen"]) == 12


class Wider(Regression):
    """Has a parameter more."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_another_model_starts_afresh_or_is_refused(caplog):
    crashed("a")
    with pytest.raises(InputError, match=r"resume=True, and there is a state of .*Regression with other parameters than .*Wider"):
        train(memory(resume=True), module=Wider())
    again("a")
    with caplog.at_level(logging.WARNING):
        found = train(memory(), module=Wider())
    assert "starting afresh: there is a state of tests" in caplog.text
    assert len(found["seen"]) == 18


def test_resume_false_starts_afresh():
    crashed("a")
    assert len(train(memory(resume=False))["seen"]) == 18


def test_a_state_that_no_safe_loader_reads_is_refused_by_its_key():
    class Strange(Callback):
        def state_dict(self):
            return {"thing": Regression}

    with pytest.raises(InputError, match=r"Strange.*thing"):
        train(memory(), Strange())


def test_a_lost_keeper_costs_nothing_but_what_it_held(runtime, caplog):
    whole = train()

    class Lose(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                os.kill(runtime.keeper_pid, 9)

    with caplog.at_level(logging.WARNING):
        found = train(memory(), Lose())
    assert same(whole, found) == []
    assert "MemoryCheckpoint goes on with a new one" in caplog.text
    runtime._connection = None
    runtime.__init__("held by the test")


def test_no_capture_while_gradients_wait():
    """Of three batches each, captured after every optimizer step: at batches 3, 6, ... and at no other."""
    captured = []

    class Noting(MemoryCheckpoint):
        def _capture(self, trainer, tiers, step):
            captured.append((step, trainer.fit_loop.epoch_loop.batch_progress.current.completed))
            super()._capture(trainer, tiers, step)

    train(Noting(job="a", every_n_steps=1, disk_dir=False), accumulate_grad_batches=3, max_epochs=2)
    assert captured == [(1, 3), (2, 0), (3, 3)]


def test_sigterm_waits_for_the_optimizer_step():
    """Received after one of three batches: a state with gradients that wait would not be exact."""

    class Signal(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.fit_loop.epoch_loop.total_batch_idx == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = train(accumulate_grad_batches=3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), pytest.warns(UserWarning, match="SIGTERM: stopped after step 3, whose state"):
        train(memory(every_n_steps=10), Signal(), accumulate_grad_batches=3)
    assert signal.getsignal(signal.SIGTERM) == before
    again("a")
    found = train(memory(), accumulate_grad_batches=3, seed=99)
    assert same(whole, found) == []
    assert len(found["seen"]) == 9


def test_a_lazy_copy_is_waited_for(monkeypatch):
    """A copy that takes longer than forward and backward: what it holds is of before the optimizer step all the same."""
    copy = Writing.copy

    def slowly(self, numbers=None):
        if threading.current_thread().name.startswith("lightning_plugins"):
            time.sleep(0.2)
        copy(self, numbers)

    monkeypatch.setattr(Writing, "copy", slowly)
    whole = train()
    crashed("a", lazy=True)
    assert same(whole, train(memory())) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be 1 step or more, got 0"),
        ({"disk_every_n_steps": 0}, "disk_every_n_steps must be 1 step or more, got 0"),
        ({"disk_dir": True}, "disk_dir must be a folder, False or None, got True"),
        ({"resume": "maybe"}, "resume must be 'auto', True or False, got 'maybe'"),
        ({"linger_s": 0}, "linger_s must be above 0 seconds, got 0"),
    ],
)
def test_values_out_of_range(options, words):
    with pytest.raises(InputError, match=words):
        MemoryCheckpoint(**options)


def test_its_repr_shows_the_settings():
    shown = repr(MemoryCheckpoint(job="a"))
    assert shown.startswith("MemoryCheckpoint(job='a', every_n_steps=10, lazy=False, disk_dir=None, disk_every_n_steps=100, ")
    assert shown.endswith("resume='auto', replay=True, linger_s=300)")


def on_disk(folder, **options):
    return memory(disk_dir=folder, disk_every_n_steps=2, **options)


def lose_memory(keeper):
    """Kill the keeper, as a host that is lost takes it along; the next client starts another one."""
    os.kill(keeper.keeper_pid, signal.SIGKILL)
    keeper._connection = None
    keeper.__init__("held by the test")


def written(folder, step, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not (step_folder(folder / "fit-0", step) / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_whose_memory_is_lost_goes_on_from_disk(runtime, tmp_path, caplog):
    whole = train()
    with pytest.raises(KeyError, match="a fault"):
        train(on_disk(tmp_path / "steps"), Crash(9))
    again("a")
    written(tmp_path / "steps", 8)
    lose_memory(runtime)
    with caplog.at_level(logging.INFO):
        found = train(on_disk(tmp_path / "steps"), seed=99)
    assert same(whole, found) == []
    assert len(found["seen"]) == 10
    assert f"going on from step 8, from disk, {tmp_path}" in caplog.text


def test_what_ended_on_disk_is_not_gone_on_from(runtime, tmp_path):
    train(on_disk(tmp_path / "steps"))
    again("a")
    lose_memory(runtime)
    assert steps(tmp_path / "steps/fit-0"), "it is there to be looked at"
    assert len(train(on_disk(tmp_path / "steps"))["seen"]) == 18


def test_a_folder_of_another_run_is_refused_and_one_that_cannot_be_written_costs_the_disk_alone(tmp_path, caplog):
    train(on_disk(tmp_path / "steps"))
    jobs._fits.clear()
    with pytest.raises(InputError, match="b/0"):
        train(on_disk(tmp_path / "steps", job="b"))
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(train(on_disk(tmp_path / "file/steps", job="c"))["seen"]) == 18
    assert "no states go to disk in this run" in caplog.text


class Read(Callback):
    """Keeps the numbers that were logged of captures."""

    def on_train_end(self, trainer, pl_module):
        self.numbers = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("memory_checkpoint/")}


@pytest.mark.parametrize("replay", [True, False])
def test_a_replay_is_logged(replay, caplog):
    """A crash before batch 11 goes on from the 10th step, the 4th of its epoch; whoever skips has nothing to say."""
    crashed("a", before=11)
    read = Read()
    start_s = time.perf_counter()
    with caplog.at_level(logging.INFO):
        assert len(train(memory(replay=replay), read)["seen"]) == 8
    lines = [line for line in caplog.messages if line.startswith("fetched the 4 batches once more that the epoch had seen: ")]
    assert len(lines) == replay
    assert ("memory_checkpoint/replay_s" in read.numbers) == replay
    if replay:
        assert 0 < read.numbers["memory_checkpoint/replay_s"] < time.perf_counter() - start_s
        assert lines[0].endswith(f": {read.numbers['memory_checkpoint/replay_s']:.2f} s")


class Slow(Callback):
    """A training whose steps take a while, the twelfth until there is a state on disk; notes when each was done."""

    def __init__(self, disk_dir):
        self.disk_dir, self.done_at = disk_dir, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.done_at[trainer.global_step] = time.monotonic()
        time.sleep(0.1)
        assert trainer.global_step != 12 or eventually(lambda: steps(self.disk_dir, thorough=False), 60)


def test_it_logs_what_it_costs_and_how_old_the_tiers_are(tmp_path):
    read, slow = Read(), Slow(tmp_path / "disk" / "fit-0")
    train(memory(disk_dir=tmp_path / "disk", disk_every_n_steps=2), slow, read, max_epochs=4)
    names = ("blocked_ms", "captured_mb", "committed_step", "memory_age_s", "disk_age_s")
    logged = {name: read.numbers.pop(f"memory_checkpoint/{name}") for name in names}
    assert read.numbers == {}
    assert 0 < logged["blocked_ms"] < 1000
    # Captured after every second step; that of the last but one is the newest that is committed when the last is captured.
    last = max(step for step in slow.done_at if step % 2 == 0 and step + 1 in slow.done_at)
    assert logged["committed_step"] == last - 2
    assert 0.2 < logged["memory_age_s"] < slow.done_at[last + 1] - slow.done_at[last - 2]
    assert logged["memory_age_s"] <= logged["disk_age_s"] < slow.done_at[last + 1] - slow.done_at[2]
