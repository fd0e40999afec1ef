"""Several gloo processes train as one process does with the union of their batches (float64). Oracle: the single process."""

import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_plugins import Preconditioner
from lightning_plugins._lightning import LightningModule, Trainer, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import METHODS

OLD = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="FSDP2 of torch 2.6 wants a GPU: its streams record events")
STRATEGIES = ["ddp", pytest.param("fsdp2", marks=OLD)]

pytestmark = pytest.mark.adapter

STEPS = 6
BATCH = 8  # of all ranks together


class Convolutional(LightningModule):
    """A net with a convolution, a norm and two matrices whose rows do not divide by the ranks."""

    def __init__(self, sharded=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 5, 3, padding=1)
        self.norm = nn.LayerNorm(30)
        self.hidden = nn.Linear(30, 7)
        self.head = nn.Linear(7, 3)
        self.sharded = sharded
        self.double()

    def configure_model(self):
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for part in (self.conv, self.hidden):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        x = self.norm(torch.tanh(self.conv(x)).flatten(1))
        return self.head(torch.tanh(self.hidden(x)))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(rank, world_size):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 2, 6, dtype=torch.float64, generator=generator)
    data = TensorDataset(x, x[:, 0, :3].argmax(dim=1))
    # Rank r has the examples r, r + W, ...: together a step's batches are the single process's batch.
    sampler = DistributedSampler(data, world_size, rank, shuffle=False)
    return DataLoader(data, batch_size=BATCH // world_size, sampler=sampler)


def trainer_of(world_size, strategy, *callbacks, **options):
    if strategy == "fsdp2":
        strategy = submodule("strategies").ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {**quiet, "max_steps": STEPS, **options}
    return Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy if world_size > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **options,
    )


def train(rank, world_size, every_options, strategy="ddp"):
    """Train with each of some options; return weights, and the bytes of inverses on this rank."""
    results = []
    for options in every_options:
        callback = Preconditioner(**options)
        module = Convolutional(strategy == "fsdp2" and world_size > 1)
        trainer_of(world_size, strategy, callback).fit(module, loader(rank, world_size))
        results.append((weights_of(module), bytes_of_inverses(callback.state_dict())))
    return results


def weights_of(module):
    return {name: whole(value).numpy() for name, value in module.named_parameters()}


def whole(parameter):
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def bytes_of_inverses(state):
    """The bytes of what is neither an average nor a count: the state of kfac's blocks without their factors."""
    found = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            found.append(value.numel() * value.element_size())
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            walk(item)

    for block in state["blocks"]:
        walk({name: value for name, value in block["state"].items() if name != "factors"})
    return sum(found)


def assert_equal(found, expected, of=""):
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.from_numpy(found[name]),
            torch.from_numpy(value),
            rtol=0,
            atol=1e-12,
            msg=lambda text, n=name: f"{of} {n}: {text}",
        )


OPTIONS = {"method": "kfac", "factor_every": 1, "inverse_every": 2, "warmup_steps": 1, "kl_clip": 0.01, "norms": "plain"}


@pytest.mark.parametrize(("world_size", "fractions"), [(2, [1.0, 0.5]), (4, [1.0, 0.5, 0.25])])
def test_ddp_equals_one_process_and_memory_falls_with_the_fraction(ranks, world_size, fractions):
    ((alone, _),) = train(0, 1, [OPTIONS])
    results = ranks.run(train, world_size, [{**OPTIONS, "worker_fraction": fraction} for fraction in fractions])
    held = []
    for of_one_fraction in zip(*results, strict=True):
        for weights, _ in of_one_fraction:
            assert_equal(weights, alone)
        held.append([size for _, size in of_one_fraction])
    assert len(set(held[0])) == 1, "with fraction 1 every rank has every inverse"
    assert all(max(fewer) < max(more) for more, fewer in pairwise(held))
    for fraction, sizes in zip(fractions, held, strict=True):
        assert sum(sizes) == pytest.approx(fraction * sum(held[0]), rel=1e-9)


# By default these make steps so long on so few examples that rounding grows a thousandfold, in one process as in two.
STEADY = {
    "ekfac": {"damping": 0.1},
    "diag": {"damping": 0.1},
    "shampoo": {"epsilon": 1e-3},
}
# Those that couple all examples of a step are for a single process.
SHARED = [name for name, entry in METHODS.items() if not entry.couples_examples]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_method_on_two_ranks_equals_one_process(ranks, strategy):
    names = [name for name in SHARED if strategy == "ddp" or not METHODS[name].replays]
    options = [*({"method": name, **STEADY.get(name, {})} for name in names), OPTIONS]
    options += [{"method": "kfac", "fisher": "exact"}] if strategy == "ddp" else [{**OPTIONS, "worker_fraction": 0.5}]
    expected = train(0, 1, [{key: value for key, value in given.items() if key != "worker_fraction"} for given in options])
    for given, (alone, _), (first, _), (second, _) in zip(
        options, expected, *ranks.run(train, 2, options, strategy), strict=True
    ):
        if given["method"] != "soap":  # it divides by moments that are rounding alone where so few examples leave its bases empty
            assert_equal(first, alone, given)
        for name, value in first.items():
            assert (value == second[name]).all(), f"replicas drift apart: {given} {name}"


def resume(rank, world_size, strategy, folder):
    """Train whole, saving after the third step, and again from there; return both weights."""
    path, finals = f"{folder}/middle.ckpt", []
    for ckpt_path in (None, path):
        module = Streamed(strategy == "fsdp2")
        module.data, module.save_to = list(loader(rank, world_size)), path if ckpt_path is None else None
        callback = Preconditioner("kfac", damping=0.1, inverse_every=4, warmup_steps=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*holds no state of")
            trainer_of(world_size, strategy, callback).fit(module, loader(rank, world_size), ckpt_path=ckpt_path)
        finals.append(weights_of(module))
    return finals


class Streamed(Convolutional):
    """Takes its batches by the step: a loader begins anew when a run is resumed."""

    def training_step(self, batch, batch_idx):
        return super().training_step(self.data[self.global_step], batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 3 and self.save_to:
            self.trainer.save_checkpoint(self.save_to)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_two_ranks_resumes_between_refreshes_with_the_same_bits(ranks, strategy, tmp_path):
    for whole_run, resumed in ranks.run(resume, 2, strategy, str(tmp_path)):
        for name, value in whole_run.items():
            assert (value == resumed[name]).all(), (name, abs(value - resumed[name]).max())


class OneBadRank(Convolutional):
    def training_step(self, batch, batch_idx):
        x = batch[0] * float("inf") if batch_idx == 2 and self.global_rank == 1 else batch[0]
        return super().training_step([x, batch[1]], batch_idx)

    def on_before_optimizer_step(self, optimizer):
        if not all(bool(parameter.grad.isfinite().all()) for parameter in self.parameters()):
            optimizer.zero_grad()


def train_with_a_bad_rank(rank, world_size, options):
    callback, module = Preconditioner(**options), OneBadRank()
    trainer_of(world_size, "ddp", callback).fit(module, loader(rank, world_size))
    state = callback.state_dict()
    return weights_of(module), state["nonfinite_batches"], state["blocks"][0]["steps"]


def test_infinity_on_one_rank_is_left_out_on_all(ranks):
    for options in (OPTIONS, {"method": "shampoo"}):
        (first, *counts), (second, *other_counts) = ranks.run(train_with_a_bad_rank, 2, options)
        assert counts == other_counts == [1, STEPS]
        for name, value in first.items():
            assert torch.from_numpy(value).isfinite().all(), (options, name)
            assert (value == second[name]).all(), (options, name, abs(value - second[name]).max())


def refused(rank, world_size, every_options):
    sentences = []
    for options in every_options:
        try:
            trainer_of(world_size, "fsdp2", Preconditioner(**options)).fit(Convolutional(True), loader(rank, world_size))
        except InputError as error:
            sentences.append(str(error))
    return sentences


def test_what_needs_whole_parameters_is_refused_with_shards(ranks):
    for sentences in ranks.run(refused, 2, [{"fisher": "mc"}, {"method": "kbfgs"}]):
        assert ["fisher='mc' needs whole parameters" in sentences[0], "kbfgs needs whole parameters" in sentences[1]] == [
            True
        ] * 2
