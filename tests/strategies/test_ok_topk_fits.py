"""What happens around and inside of a fit: a second one, a search for a rate, optimizers that step where nothing is logged."""

import csv
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import OkTopkStrategy
from lightning_plugins._lightning import CSVLogger, Trainer, submodule
from tests.strategies.ok_topk_parts import BUCKETS, OPTIONS, QUIET, Net, assert_same, fit, flat

pytestmark = pytest.mark.adapter


class Remembers(Net):
    """Keeps what waits when a fit begins, and takes every batch as a new one."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def on_train_start(self):
        state = self.trainer.strategy.rank_state_dict()
        self.begun.append((state["steps"], flat(state["residual"][name] for name in state["shapes"])))


def fit_twice(rank, world_size):
    """Return what waits at the begin and the end of two fits, and at the begin of one of another module."""
    torch.set_num_threads(1)
    trainer = Trainer(accelerator="cpu", devices=world_size, strategy=OkTopkStrategy(**OPTIONS, **BUCKETS), max_steps=3, **QUIET)
    data = DataLoader(TensorDataset(torch.zeros(100, 1)), batch_size=1)
    module, other = Remembers(), Remembers()
    trainer.fit(module, data)
    state = trainer.strategy.rank_state_dict()
    ended = state["steps"], flat(state["residual"][name] for name in state["shapes"])
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(module, data)
    steps = trainer.strategy.rank_state_dict()["steps"]
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(other, data)
    return ended, module.begun[1], steps, other.begun[0]


def test_a_second_fit_of_a_module_goes_on_with_what_waits(ranks):
    for ended, begun, steps, other in ranks.run(fit_twice, 2):
        assert begun[0] == ended[0] == 3
        assert ended[1].any()
        assert torch.equal(begun[1], ended[1])
        assert steps == 6
        assert other[0] == 0
        assert not other[1].any(), "residuals of one module are not sent for another"


class Watched(Net):
    """Keeps what is logged of the bytes after each step."""

    def __init__(self):
        super().__init__()
        self.sent_mb = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.sent_mb.append(self.trainer.callback_metrics.get("ok_topk/sent_mb"))


def log_two_fits(rank, world_size):
    """Return what is logged in the first step of a second fit, the fourth of all, by the interval of the logs."""
    torch.set_num_threads(1)
    found = {}
    for every in (1, 2):
        strategy = OkTopkStrategy(**OPTIONS, **BUCKETS, log_every=every)
        trainer = Trainer(accelerator="cpu", devices=world_size, strategy=strategy, max_steps=3, **QUIET)
        data, module = DataLoader(TensorDataset(torch.zeros(100, 1)), batch_size=1), Watched()
        trainer.fit(module, data)
        trainer.fit_loop.epoch_loop.max_steps = 6
        trainer.fit(module, data)
        found[every] = float(module.sent_mb[3])
    return found


def test_the_first_log_of_a_second_fit_is_of_its_own_steps(ranks):
    """Though the first one has begun the interval, its steps are not counted in."""
    for found in ranks.run(log_two_fits, 2):
        assert found[2] == pytest.approx(found[1], abs=1e-9)
        assert found[1] > 0


def search(rank, world_size, folder):
    """Train with a search for a learning rate before, which leaves nothing behind but its finding, and without."""
    torch.set_num_threads(1)
    finder = submodule("callbacks").LearningRateFinder(num_training_steps=5, update_attr=False)
    options = {"threshold": "exact", "dense_steps": 2}
    outcomes = []
    for callbacks in ([], [finder]):
        module = Net()
        module.learning_rate = 0.1
        strategy = OkTopkStrategy(**{**OPTIONS, **options}, **BUCKETS)
        outcomes.append(fit(module, world_size, strategy, callbacks=callbacks, default_root_dir=folder))
    return outcomes, len(finder.optimal_lr.results["loss"])


def test_a_search_for_a_rate_takes_its_residuals_back(ranks, tmp_path):
    for (plain, searched), tried in ranks.run(search, 2, str(tmp_path)):
        assert tried == 5
        assert_same(searched, plain)


class StepsAtTheEnd(Net):
    """Steps by hand when an epoch is over, where Lightning logs nothing by the step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, _, batch_idx):
        self.manual_backward(self(self.batch(batch_idx)))

    def on_train_epoch_end(self):
        self.optimizers().step()
        self.optimizers().zero_grad()


def step_at_the_end(rank, world_size, folder):
    logger = CSVLogger(folder, name="log", version=rank)
    strategy = OkTopkStrategy(**OPTIONS, log_every=1, **BUCKETS)
    fit(StepsAtTheEnd(), world_size, strategy, logger=logger, limit_train_batches=1, max_epochs=3)
    return strategy.ok_topk.steps


def test_it_logs_where_lightning_does_not(ranks, tmp_path):
    assert ranks.run(step_at_the_end, 2, str(tmp_path)) == [3, 3]
    with Path(tmp_path, "log", "version_0", "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["ok_topk/selected_over_k"]]) == 3


class Skips(Net):
    """Has one bad batch at the start."""

    def __init__(self):
        super().__init__(bad={(0, 1)})


def log_after_a_skip(rank, world_size, folder):
    logger = CSVLogger(folder, name="log", version=rank)
    strategy = OkTopkStrategy(**OPTIONS, log_every=5, **BUCKETS)
    fit(Skips(), world_size, strategy, logger=logger, log_every_n_steps=5, max_steps=20, limit_train_batches=4)


def test_a_step_that_is_left_out_does_not_end_the_logs(ranks, tmp_path):
    """Its own interval and the Trainer's would never meet again."""
    ranks.run(log_after_a_skip, 2, str(tmp_path))
    with Path(tmp_path, "log", "version_0", "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["ok_topk/selected_over_k"]]) == 4
