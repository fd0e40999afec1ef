"""The ranks' side of the tests that kill: a training that says in a file in which phase it is, byte by byte."""

import mmap
import os
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_plugins import OkTopkStrategy, Preconditioner
from lightning_plugins._lightning import Callback, submodule
from lightning_plugins.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_plugins.engines.resilience.commit import JobCommit
from tests.callbacks.memory_checkpoint.runs import Regression, train
from tests.callbacks.memory_checkpoint.runs import memory as memory_only
from tests.ranks import linux
from tests.ranks.rank import progress

PHASES = ("start", "data", "forward", "backward", "optimizer", "capture", "end")
STEP_S = 0.02  # added to forward, backward, data, optimizer and commit, so that kills find them


class Phases(Callback):
    """Writes the phase that begins into a byte, and into the next whether a commit is under way.

    Args:
        path: of a file of two bytes.
    """

    def __init__(self, path):
        with open(path, "r+b") as file:
            self.bytes = mmap.mmap(file.fileno(), 2)

    def enter(self, phase):
        self.bytes[0] = PHASES.index(phase)
        if phase in ("forward", "backward", "optimizer", "data"):
            time.sleep(STEP_S / 4)

    def on_train_start(self, trainer, pl_module):
        progress("training")
        self.enter("data")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        progress(("batch", trainer.fit_loop.epoch_loop.total_batch_idx))
        self.enter("forward")

    def on_before_backward(self, trainer, pl_module, loss):
        self.enter("backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.enter("optimizer")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.enter("data")

    def on_train_end(self, trainer, pl_module):
        self.enter("end")
        print("logged:", *sorted(name for name in trainer.callback_metrics if name.startswith("memory_checkpoint/")))


def watched(phases):
    """Let captures and commits say that they are under way, and what becomes of a sealed step take its time."""
    capture, run, decide = MemoryCheckpoint._capture, JobCommit._run, JobCommit._decide

    def telling(self, *arguments):
        phases.enter("capture")
        capture(self, *arguments)
        phases.enter("data")

    def telling_too(self, *arguments):
        phases.bytes[1] = 1
        run(self, *arguments)
        phases.bytes[1] = 0

    def dawdling(self, step):
        time.sleep(STEP_S / 8)
        word = decide(self, step)
        time.sleep(STEP_S / 8)
        return word

    MemoryCheckpoint._capture, JobCommit._run, JobCommit._decide = telling, telling_too, dawdling


def run_combined(rank, world_size, path, job):
    """Train with a preconditioner, gradients that travel sparsely, and captures; return what has to be alike."""
    phases = Phases(f"{path}{rank}")
    memory = memory_only(job)
    curvature = Preconditioner("kfac", damping=0.1, factor_every=1, inverse_every=2, warmup_steps=0)
    strategy = OkTopkStrategy(density=0.2, threshold_every=3)
    return train(memory, curvature, phases, strategy=strategy, devices=world_size, max_epochs=4)


class Wide(Regression):
    """Has gradients that become ready in another order than that of its parameters, and enough of them to see it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(4, 300), nn.Linear(300, 4)
        self.net = nn.Sequential(nn.Identity(), self.net)

    def training_step(self, batch, batch_idx):
        inputs, indices = batch
        return super().training_step((inputs + self.second(self.first(inputs).tanh()), indices), batch_idx)


def run_wide(rank, world_size, path, job):
    """Train a wider net in plain DDP."""
    phases = Phases(f"{path}{rank}")
    return train(memory_only(job), phases, module=Wide(), strategy="ddp", devices=world_size, max_epochs=4)


class Sharded(Regression):
    """Rows of its layers lie on all ranks, not in equal numbers; the normalization lies on each."""

    def __init__(self, tensor_parallel=False):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4, bias=False)
        self.tensor_parallel = tensor_parallel

    def configure_model(self):
        if self.tensor_parallel:
            plan = {"first": ColwiseParallel(output_layouts=Replicate()), "second": RowwiseParallel(input_layouts=Replicate())}
            parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
        else:
            for part in (self.first, self.second, self.net[0]):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        inputs, indices = batch
        return super().training_step((inputs + self.second(self.first(inputs).tanh()), indices), batch_idx)


def run_sharded(rank, world_size, path, job, tensor_parallel=False, **options):
    """Train with a model of which each rank holds a part."""
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": world_size} if tensor_parallel else {}
    strategy = submodule("strategies").ModelParallelStrategy(
        **{"data_parallel_size": world_size, "tensor_parallel_size": 1, **sizes}, save_distributed_checkpoint=False
    )
    memory = memory_only(job, **options)
    return train(
        memory, Phases(f"{path}{rank}"), module=Sharded(tensor_parallel), strategy=strategy, devices=world_size, max_epochs=4
    )


class SlowUntilOnDisk(Callback):
    """Gives the writers time: they take seconds to start, and a batch takes none.

    Args:
        disk_dir: of ``MemoryCheckpoint``.
    """

    def __init__(self, disk_dir):
        self.folder = Path(disk_dir) / "fit-0"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(list(self.folder.glob("step-*"))) < 2:
            time.sleep(0.3)


def run_on_hosts(rank, world_size, path, folders, job, disk_dir=False, epochs=6, callbacks=(), **options):
    """Train in plain DDP, a rank a host, each with a keeper of its own."""
    os.environ["XDG_RUNTIME_DIR"] = folders[rank]
    phases = Phases(f"{path}{rank}")
    memory = memory_only(job, disk_dir=disk_dir, disk_every_n_steps=2)
    return train(memory, phases, *callbacks, strategy="ddp", devices=1, num_nodes=world_size, max_epochs=epochs, **options)


def run_on_storage(rank, world_size, path, folders, job, disk_dir, epochs):
    """Do so with a folder on disk that all hosts see."""
    return run_on_hosts(rank, world_size, path, folders, job, disk_dir, epochs, [SlowUntilOnDisk(disk_dir)])


def run_on_hosts_apart(rank, world_size, path, folders, job, disk_dir, root):
    """Do so where ``root`` is a disk of each host's own."""
    if rank > 0:
        linux.leave_mounts()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", root], check=True)
    return run_on_hosts(rank, world_size, path, folders, job, disk_dir, default_root_dir=root)


def run(rank, world_size, path, job, memory=(), max_epochs=2):
    """Train, and return what has to be alike."""
    phases = Phases(f"{path}{rank}")
    watched(phases)
    strategy = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    return train(memory_only(job, **dict(memory)), phases, max_epochs=max_epochs, **strategy)
