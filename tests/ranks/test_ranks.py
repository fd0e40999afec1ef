"""The ranks themselves: what they return, how they fail, what they leave behind. Every process here is a real one."""

import atexit
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import linux
from tests.ranks.client import RankFailure, RankTimeout
from tests.ranks.rank import SERVER_VARIABLE, progress


def all_reduced(rank, world_size, values):
    tensor = torch.tensor(values, dtype=torch.float64) * (rank + 1)
    dist.all_reduce(tensor)
    return tensor, os.getpid(), torch.get_num_threads()


def test_ranks_form_a_group_and_return_their_values(ranks):
    results = ranks.run(all_reduced, 3, [1.0, 0.5])
    for tensor, _, threads in results:
        assert tensor.tolist() == [6.0, 3.0]
        assert threads == 1
    assert len({pid for _, pid, _ in results}) == 3
    assert all(linux.state(pid) == "" for _, pid, _ in results)


def no_group(rank, world_size):
    return dist.is_initialized(), os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["COLOUR"], os.getcwd()


def test_without_init_there_are_only_the_variables(ranks):
    where = str(ranks.root)
    assert ranks.run(no_group, 2, init=False, env={"COLOUR": "red"}) == [
        (False, "0", "2", "red", where),
        (False, "1", "2", "red", where),
    ]


def lightning_and_start(rank, world_size):
    started = time.monotonic()
    from lightning_plugins._lightning import NAMESPACE, Trainer

    return NAMESPACE, Trainer.__module__.startswith(NAMESPACE), time.monotonic() - started


def test_lightning_is_there_at_once(ranks):
    wanted = os.environ.get("LIGHTNING_PLUGINS_NAMESPACE", "pytorch_lightning")
    for namespace, right_tree, seconds in ranks.run(lightning_and_start, 2, init=False):
        assert (namespace, right_tree) == (wanted, True)
        assert seconds < 1.0


def trained(rank, world_size):
    from lightning_plugins._lightning import LightningModule, Trainer

    class Regression(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.ones_(self.layer.weight)

        def training_step(self, batch, batch_idx):
            return (self.layer(batch[0])).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    model = Regression()
    data = torch.utils.data.TensorDataset(torch.tensor([[1.0], [2.0]]))
    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=1))
    return trainer.world_size, trainer.global_rank, model.layer.weight.item()


@pytest.mark.adapter
@pytest.mark.parametrize("init", [True, False])
def test_a_trainer_finds_its_place_by_itself(ranks, init):
    """The mean gradient of the two samples is 1.5, so both ranks end at 1 - 1.5."""
    assert ranks.run(trained, 2, init=init) == [(2, 0, -0.5), (2, 1, -0.5)]


def one_raises(rank, world_size):
    if rank == 1:
        print("the last words of rank 1")
        raise ValueError("density is 2")
    dist.barrier()


def test_a_traceback_names_its_rank(ranks):
    with pytest.raises(RankFailure) as caught:
        ranks.run(one_raises, 3)
    message = str(caught.value)
    assert message.startswith("rank 1 of 3 raised")
    assert "in one_raises" in message
    assert "ValueError: density is 2" in message
    assert "the last words of rank 1" in message


def one_raises_one_sleeps(rank, world_size):
    if rank == 0:
        raise ValueError("nobody tells rank 1")
    time.sleep(600)


def test_a_failure_ends_the_other_ranks(ranks):
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 0 of 2 raised(.|\n)*nobody tells rank 1(.|\n)*rank 1 of 2 was still running"):
        ranks.run(one_raises_one_sleeps, 2, init=False, timeout_s=8)
    assert time.monotonic() - started < 6


def one_exits(rank, world_size):
    if rank == 0:
        sys.exit(3)


def test_an_early_exit_is_a_failure(ranks):
    with pytest.raises(RankFailure, match="rank 0 of 2 did not return and ended with exit code 3"):
        ranks.run(one_exits, 2, init=False)


def breaks_on_its_way_out(rank, world_size):
    atexit.register(os._exit, 5)


def test_a_crash_after_the_return_is_a_failure(ranks):
    with pytest.raises(RankFailure, match="rank 0 of 1 returned and ended with exit code 5"):
        ranks.run(breaks_on_its_way_out, 1, init=False)


def one_hangs(rank, world_size):
    if rank == 1:
        threading.Thread(target=the_line_it_hangs_in, daemon=True).start()
        time.sleep(600)


def the_line_it_hangs_in():
    threading.Event().wait()


def test_a_hang_ends_with_every_stack(ranks):
    started = time.monotonic()
    with pytest.raises(RankTimeout) as caught:
        ranks.run(one_hangs, 2, timeout_s=0.6, init=False)
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert "rank 0 of 2 returned and ended with exit code 0" in message
    assert "stack of rank 1" in message
    assert "in one_hangs" in message
    assert "in the_line_it_hangs_in" in message


def leaves_a_daemon(rank, world_size):
    """A process of its own session, whose parent ends at once: nobody's child any more."""
    starter = (
        "import subprocess, sys;"
        "p = subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=subprocess.DEVNULL);"
        "print(p.pid)"
    )
    daemon = int(subprocess.run([sys.executable, "-c", starter], stdout=subprocess.PIPE, check=True).stdout)
    progress(daemon)
    assert linux.state(daemon) in ("R", "S")
    return daemon


def test_daemons_of_ranks_live_as_long_as_the_handle(ranks):
    with ranks.start(leaves_a_daemon, 1, init=False) as handle:
        handle.join(20)
        daemon = handle.results()[0]
        assert linux.state(daemon) in ("R", "S")
    assert linux.state(daemon) == ""


def nested_function():
    def inner(rank, world_size):
        return rank

    return inner


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (all_reduced, {"world_size": 0}, "world_size must be 1 or more, got 0"),
        (all_reduced, {"world_size": 2, "hosts": []}, "one host for each of the 2 ranks, got 0"),
        (nested_function(), {"world_size": 1}, "inner cannot be found by another process; move it to the top level"),
    ],
)
def test_bad_input_is_refused(ranks, function, arguments, message):
    with pytest.raises(ValueError, match=message):
        ranks.run(function, **arguments)


def test_progress_belongs_to_ranks():
    with pytest.raises(RuntimeError, match="outside of a rank"):
        progress(1)


class Unloadable:
    def __reduce__(self):
        return os.listdir, ("/no/such/folder",)


def test_arguments_that_do_not_load_are_reported(ranks):
    with pytest.raises(RankFailure, match=r"could not be started(.|\n)*No such file"):
        ranks.run(all_reduced, 1, Unloadable())


def big_result(rank, world_size, count):
    for step in range(3):
        progress(torch.full((count,), float(step)))
    return torch.full((count,), float(rank))


def test_large_messages_arrive_whole(ranks):
    count = 1_000_000
    with ranks.start(big_result, 2, count, init=False) as handle:
        handle.join(20)
        for rank, result in enumerate(handle.results()):
            assert torch.equal(result, torch.full((count,), float(rank)))
        for rank in range(2):
            steps = [value[0].item() for sender, value, _ in handle.messages if sender == rank]
            assert steps == [0.0, 1.0, 2.0]


SLEEPS = """
import time

def sleeps(rank, world_size):
    time.sleep(600)
"""
SESSION = """
import sys
from pathlib import Path
from sleeping import sleeps
from tests.ranks.launch import rank_server
with rank_server(Path.cwd()) as ranks:
    handle = ranks.start(sleeps, 2, init=False)
    while not handle.pids:
        handle.exit_codes
    print(*handle.pids, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("own_server", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_test_process_takes_everything_with_it(ranks, tmp_path, own_server):
    (tmp_path / "sleeping.py").write_text(SLEEPS)
    environment = {**os.environ, "PYTHONPATH": f"{ranks.root}{os.pathsep}{tmp_path}", SERVER_VARIABLE: ranks.address}
    if own_server:
        del environment[SERVER_VARIABLE]
    with subprocess.Popen(
        [sys.executable, "-c", SESSION], cwd=ranks.root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as session:
        pids = [int(pid) for pid in session.stdout.readline().split()]
        assert len(pids) == 2
        assert all(linux.state(pid) in ("R", "S") for pid in pids)
        assert len(linux.owned_by(session.pid)) == (5 if own_server else 0)  # server, supervisor, store and ranks
        session.kill()
    deadline = time.monotonic() + 5
    while (linux.owned_by(session.pid) or any(map(linux.state, pids))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [linux.state(pid) for pid in pids] == ["", ""]
    assert linux.owned_by(session.pid) == []
