"""What the tests of Ok-Topk's strategies train: a small net whose batches go by the step, and a plain loop that does the same."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins._lightning import LightningModule, Trainer
from lightning_plugins.engines.sparse_allreduce import OkTopkState, ok_topk_hook

STEPS = 6
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
BUCKETS = {"bucket_cap_mb": 0.001}  # a bucket for each matrix or so
OPTIONS = {"density": 0.05, "threshold_every": 3}


def batch(number, rank):
    """The examples of a step on a rank: a loader would begin anew when a run is resumed."""
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(1000 * number + rank))


class Net(LightningModule):
    """A perceptron of several buckets.

    Args:
        numbers: of the batches, by step; 0, 1, ... if left out.
        bad: ``(number, rank)`` of batches that are NaN.
        save: path of a checkpoint by the number of steps after which it is saved.
    """

    def __init__(self, numbers=None, bad=(), save=None, hidden=16):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, 16), nn.Tanh(), nn.Linear(16, 3))
        self.numbers, self.bad, self.save = numbers or range(1000), set(bad), save or {}

    def forward(self, x):
        return functional.cross_entropy(self.layers(x), x[:, :3].nan_to_num().argmax(dim=1))

    def batch(self, batch_idx):
        parts = self.trainer.accumulate_grad_batches
        number = self.numbers[self.global_step * parts + batch_idx % parts]
        x = batch(number, self.global_rank)
        return x * float("nan") if (number, self.global_rank) in self.bad else x

    def training_step(self, _, batch_idx):
        return self(self.batch(batch_idx))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step in self.save:
            self.trainer.save_checkpoint(self.save[self.global_step])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(module, world_size, strategy, ckpt_path=None, **options):
    """Train a module and return what there is to compare at the end of it, see `outcome`."""
    torch.set_num_threads(1)
    options = {**QUIET, "max_steps": STEPS, **options}
    trainer = Trainer(accelerator="cpu", devices=world_size, strategy=strategy, use_distributed_sampler=False, **options)
    data = DataLoader(TensorDataset(torch.zeros(100, 1)), batch_size=1)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return outcome(module, trainer.optimizers[0], getattr(strategy, "ok_topk", None))


def plain(rank, world_size, options, *, accumulate=1, clip=None, autocast=False, steps=STEPS):
    """Do what `fit` with ``OkTopkStrategy(**options)`` should, in a loop that has nothing of Lightning."""
    torch.set_num_threads(1)
    module = Net()
    ddp = DistributedDataParallel(module, **BUCKETS)
    state = OkTopkState(ddp, **options)
    ddp.register_comm_hook(state, ok_topk_hook)
    optimizer = module.configure_optimizers()
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            with ddp.no_sync() if part + 1 < accumulate else nullcontext():
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False, enabled=autocast):
                    loss = ddp(batch(step * accumulate + part, rank))
                (loss / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    state.close()
    return outcome(module, optimizer, state)


def outcome(module, optimizer, state):
    """Return weights, momentum and residual in the order of the parameters, and the steps that were reduced."""
    found = {"weights": flat(module.parameters())}
    found["momentum"] = flat(value["momentum_buffer"] for value in optimizer.state.values())
    if state is not None:
        saved = state.rank_state_dict()
        found["residual"] = flat(saved["residual"][name] for name in saved["shapes"])
        found["steps"], found["skipped"] = torch.tensor(saved["steps"]), torch.tensor(saved["skipped_count"])
    return found


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_same(found, expected, of="", but=()):
    """Demand the same bits in everything that both outcomes have."""
    for name in found.keys() & expected.keys() - set(but):
        difference = (found[name].double() - expected[name].double()).abs().max()
        assert torch.equal(found[name], expected[name]), f"{of} {name}: differs by up to {difference}"


def refusal(call, *args, **kwargs):
    """Return the type and sentence of what a call raises."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
