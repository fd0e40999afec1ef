"""Every kind of data loader in a run that goes on in the middle of an epoch, against the run that was never interrupted."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, TensorDataset

from lightning_plugins._lightning import LightningModule, Trainer, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.callbacks.memory_checkpoint._seams import refuse_loaders
from tests.callbacks.memory_checkpoint.runs import BATCH, SAMPLES, Noisy, Regression, Watch, same, train

pytestmark = [pytest.mark.adapter, pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")]


class Quiet(Dataset):
    """Draws nothing, and counts how often each sample is read, in all processes together."""

    def __init__(self, samples=SAMPLES):
        self.reads = torch.zeros(samples, dtype=torch.int64).share_memory_()

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        return torch.full((4,), index / SAMPLES), torch.tensor(index)


class Stream(IterableDataset):
    """Has a state, and draws noise where it is read without workers: their generators are no part of any state."""

    def __init__(self):
        self.at, self.begin = 0, 0

    def __iter__(self):
        # Not in the generator, which begins with the first sample only: the state is asked for before that.
        self.at, self.begin = self.begin, 0
        return self.read(torch.utils.data.get_worker_info())

    def read(self, worker):
        mine = range(SAMPLES) if worker is None else range(worker.id, SAMPLES, worker.num_workers)
        while self.at < len(mine):
            index = mine[self.at]
            self.at += 1
            noise = torch.randn(4) if worker is None else torch.zeros(4)
            yield torch.full((4,), index / SAMPLES) + 0.1 * noise, torch.tensor(index)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.begin = state["at"]


class SizedStream(Stream):
    """Says how long it is, so that Lightning fetches no batch ahead."""

    def __len__(self):
        return SAMPLES


class Counted(IterableDataset):
    """Has no state, and draws nothing."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for index in range(SAMPLES) if worker is None else range(worker.id, SAMPLES, worker.num_workers):
            yield torch.full((4,), index / SAMPLES), torch.tensor(index)


class Loaded(Regression):
    """Trains on what it is given; of several loaders on their batches one after the other."""

    def __init__(self, make):
        torch.manual_seed(5)
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make()

    def training_step(self, batch, batch_idx):
        if isinstance(batch[0], torch.Tensor):
            return super().training_step(batch, batch_idx)
        inputs, indices = zip(*[one for one in batch if one is not None], strict=True)
        return super().training_step((torch.cat(inputs), torch.cat(indices)), batch_idx)


def differing(make, boundaries, replay=True, **options):
    """Return what differs in runs that go on from each boundary, from another seed."""
    whole = train(Watch(), module=Loaded(make), **options)
    found = {}
    for at in boundaries:
        taking = Watch(at)
        train(taking, module=Loaded(make), **options)
        found[at] = same(whole, train(Watch(resume=taking.saved, replay=replay), module=Loaded(make), seed=99, **options))
    return {at: names for at, names in found.items() if names}


def stateful(*arguments, **options):
    """Return torchdata's loader, or leave the test out."""
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(*arguments, **options)


def generator():
    return torch.Generator().manual_seed(7)


EPOCHS = {"max_epochs": 2, "limit_val_batches": 0}
PLACES = (1, 4, 6, 9)  # boundaries: in the first epoch, at the beginning of the second, in the second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", [DataLoader, stateful], ids=["plain", "stateful"])
def test_data_that_draw_random_numbers(loader, workers):
    assert differing(lambda: loader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=workers), PLACES, **EPOCHS) == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_generator_of_the_loaders_own(workers):
    """Goes on from epoch to epoch, and no seed of the process says where it is."""

    def make():
        own = torch.Generator().manual_seed(7)
        return DataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=workers, generator=own)

    assert differing(make, PLACES, **EPOCHS) == {}


def test_loaders_that_are_drawn():
    """A random split is made before any iterator is."""

    def make():
        return DataLoader(torch.utils.data.random_split(Noisy(), [16, 8])[0], batch_size=BATCH)

    assert differing(make, (1, 4, 6), **EPOCHS) == {}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [Stream, SizedStream])
def test_a_stream_with_a_state(data, workers):
    """Without a length Lightning fetches one batch ahead: the first boundary of all has one in hand."""
    assert differing(lambda: stateful(data(), batch_size=BATCH, num_workers=workers), (0, *PLACES), **EPOCHS) == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_a_state_that_draws_nothing(workers):
    def make():
        return stateful(Counted(), batch_size=BATCH, num_workers=workers)

    with pytest.raises(InputError, match="reads Counted, iterable and without a state of its own, so torchdata's"):
        refused(make(), "min_size", True)
    assert differing(make, (0, *PLACES), replay=False, **EPOCHS) == {}


def test_batches_without_a_length():
    """Of a plain loader, replayed: one batch is in hand there, too."""

    class Endless(BatchSampler):
        def __len__(self):
            raise TypeError("nobody knows")

    def make():
        data = Noisy()
        return DataLoader(data, batch_sampler=Endless(RandomSampler(data), BATCH, drop_last=False))

    assert differing(make, (0, *PLACES), **EPOCHS) == {}
    assert differing(make, (0, *PLACES), replay=False, **EPOCHS) == {}


class Ranked(DistributedSampler):
    """Of the second of two ranks; its order follows from the epoch, which is set after the loaders are made."""

    def __init__(self, data, **options):
        super().__init__(data, 2, 1, **options)


SKIPPED = {
    "shuffle": lambda data, workers: DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers),
    "no batches": lambda data, workers: DataLoader(data, batch_size=None, sampler=RandomSampler(data), num_workers=workers),
    "rank": lambda data, workers: DataLoader(data, batch_size=2, sampler=Ranked(data), num_workers=workers),
    "batch_sampler": lambda data, workers: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data), BATCH, drop_last=True), num_workers=workers
    ),
    "stateful": lambda data, workers: stateful(data, batch_size=BATCH, shuffle=True, num_workers=workers),
    "stateful rank": lambda data, workers: stateful(data, batch_size=2, sampler=Ranked(data), num_workers=workers),
    "persistent": lambda data, workers: DataLoader(
        data, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    ),
}


class Single(Loaded):
    """Makes batches of single samples."""

    def training_step(self, batch, batch_idx):
        inputs, indices = batch
        return super().training_step((inputs.expand(2, 4), indices[None]) if inputs.ndim == 1 else batch, batch_idx)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", SKIPPED)
def test_skipping_reads_no_sample_that_the_epoch_has_seen(kind, workers):
    options = {"max_epochs": 2, "limit_val_batches": 0}

    def fit(watch, **more):
        data = Quiet()
        return train(watch, module=Single(lambda: SKIPPED[kind](data, workers)), **options, **more), data.reads

    whole, reads = fit(Watch())
    per_epoch = len(whole["seen"]) // 2
    for at in (2, per_epoch, per_epoch + 3):
        taking = Watch(at)
        fit(taking)
        found, again = fit(Watch(resume=taking.saved, replay=False), seed=99)
        assert same(whole, found) == [], f"boundary {at}"
        assert again.sum() == reads.sum() - sum(len(seen) - 2 for seen in whole["seen"][:at]), f"boundary {at}"


def run_ranked(rank, world_size, workers):
    """Return the facts of a whole run and of one that goes on in its second epoch, and how many samples that one reads."""
    options = {"strategy": "ddp", "devices": world_size, **EPOCHS}

    def fit(watch):
        data = Quiet()
        module = Loaded(lambda: DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers))
        return train(watch, module=module, **options), int(data.reads.sum())

    whole, _ = fit(Watch())
    taking = Watch(5)
    fit(taking)
    return whole, *fit(Watch(resume=taking.saved, replay=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_on_two_ranks(ranks, workers):
    """Lightning gives each rank's loader its part of the samples, in the order of the epoch; one batch is left of three."""
    found = ranks.run(run_ranked, 2, workers, init=False, timeout_s=120)
    assert [same(whole, resumed) for whole, resumed, _ in found] == [[], []]
    assert [reads for _, _, reads in found] == [BATCH, BATCH]
    first, second = ({sample for seen in whole["seen"] for sample in seen[2:]} for whole, _, _ in found)
    assert first != second


def several(kinds, lengths, workers, mode):
    """Return loaders side by side, the first of which may be shorter."""
    loaders = [kind(length, workers) for kind, length in zip(kinds, lengths, strict=True)]
    return submodule("utilities.combined_loader").CombinedLoader(loaders, mode)


class Part(Noisy):
    """Fewer samples that are never twice the same."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples


def noisy(length, workers):
    return DataLoader(Part(length), batch_size=BATCH, shuffle=True, num_workers=workers)


def quiet(length, workers):
    return DataLoader(Quiet(length), batch_size=BATCH, shuffle=True, num_workers=workers)


def quiet_stateful(length, workers):
    return stateful(Quiet(length), batch_size=BATCH, shuffle=True, num_workers=workers)


def stream(length, workers):
    return stateful(Stream(), batch_size=BATCH, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
@pytest.mark.parametrize(("kinds", "replay"), [((noisy, noisy), True), ((quiet, quiet), False)], ids=["replay", "skip"])
def test_loaders_side_by_side(kinds, replay, mode, workers):
    """The first is at its end after 2 batches, and begins anew or not: boundaries before, at and after that."""
    places = (1, 2, 3, 5, 9) if mode != "min_size" else (1, 2, 3)
    assert differing(lambda: several(kinds, (8, 24), workers, mode), places, replay, **EPOCHS) == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_beside_a_stream(workers):
    """Which says when the epoch is at its end: when both have been."""
    kinds = (quiet, quiet_stateful, stream)
    assert differing(lambda: several(kinds, (8, 12, 24), workers, "max_size_cycle"), (0, 2, 3, 5, 9), False, **EPOCHS) == {}


class Numbers(IterableDataset):
    """Has no state."""

    def __iter__(self):
        return iter(torch.randn(8, 4))


class Bare(LightningModule):
    """Trains on loaders that it is given."""

    def __init__(self, loaders):
        super().__init__()
        self.layer, self.loaders = torch.nn.Linear(4, 1), loaders

    def training_step(self, batch, batch_idx):
        return self.layer(next(iter(batch)) if isinstance(batch, list | tuple) else batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return self.loaders


class Counting(DataLoader):
    """Has a state."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


ROWS = TensorDataset(torch.randn(8, 4))


@pytest.mark.parametrize(
    ("loaders", "mode", "replay", "words"),
    [
        ([DataLoader(Numbers())], "min_size", True, "loader 0 reads Numbers, iterable and without a state"),
        ([DataLoader(ROWS), DataLoader(Numbers())], "min_size", False, "loader 1 reads Numbers, iterable and without a state"),
        ([DataLoader(ROWS, num_workers=1, persistent_workers=True)], "min_size", True, "has persistent_workers=True"),
        ([torch.randn(8, 4)], "min_size", False, "training loader 0 is a Tensor; give replay=True"),
        ([DataLoader(ROWS), Counting(Numbers())], "min_size", True, r"loader 1 \(Numbers\) goes on by its state alone"),
        ([DataLoader(ROWS), Counting(Numbers())], "max_size", False, r"loader 1 goes on by its state, which .*max_size.* cannot"),
    ],
)
def test_data_without_a_way_back_is_refused_by_name(loaders, mode, replay, words):
    with pytest.raises(InputError, match=words):
        refused(loaders, mode, replay)


def refused(loaders, mode, replay):
    """Train until loaders are refused."""

    class Refuse(Watch):
        def on_train_start(self, trainer, pl_module):
            refuse_loaders(trainer, replay)

    combined = submodule("utilities.combined_loader").CombinedLoader(loaders, mode)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_epochs=1, callbacks=[Refuse()], **options).fit(Bare(combined))
