"""Canaries: what `_seams.py` touches of Lightning, and `_ddp_seams.py` of DDP, still is where it was. Each name that goes is
named here."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_plugins._lightning import Trainer, submodule

pytestmark = pytest.mark.adapter

SETTINGS = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def trainer():
    return Trainer(accelerator="cpu", **SETTINGS)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("fit_loop", ["setup_data", "_combined_loader", "_data_fetcher", "_should_reload_train_dl", "restarting"]),
        ("fit_loop", ["_load_combined_loader_states", "_combined_loader_states_to_load"]),
        ("fit_loop.epoch_loop", ["on_run_start", "_on_before_fetch", "_results", "restarting", "batch_progress"]),
        ("fit_loop.epoch_loop.batch_progress", ["current", "total"]),
        ("_checkpoint_connector", ["dump_checkpoint", "_restore_modules_and_callbacks", "_loaded_checkpoint"]),
        ("_logger_connector", ["_progress_bar_metrics", "_logged_metrics", "_callback_metrics"]),
    ],
)
def test_names_are_there(trainer, path, names):
    found = trainer
    for part in path.split("."):
        found = getattr(found, part)
    missing = [name for name in names if not hasattr(found, name)]
    assert not missing, f"trainer.{path} has no {missing} any more: see callbacks/memory_checkpoint/_seams.py"


def test_the_fetcher_is_told_before_each_fetch_through_the_loops_own_attribute(trainer):
    source = inspect.getsource(type(trainer.fit_loop.epoch_loop).on_run_start)
    assert "data_fetcher._start_profiler = self._on_before_fetch" in source
    assert "data_fetcher.fetched += self.batch_progress.current.ready" in source


def test_loaders_get_their_states_right_before_their_iterators_are_made(trainer):
    source = inspect.getsource(type(trainer.fit_loop).setup_data)
    steps = ["combined_loader.limits = limits", "self._load_combined_loader_states()", "iter(self._data_fetcher)"]
    assert steps == sorted((step for step in steps if step in source), key=source.index)


@pytest.mark.parametrize(
    ("mode", "names"), [("min_size", ["iterables", "iterators"]), ("max_size_cycle", ["iterables", "iterators", "_consumed"])]
)
def test_a_combined_loader_makes_its_iterators_in_a_list(mode, names):
    combined = submodule("utilities.combined_loader").CombinedLoader([[1], [2, 3]], mode)
    iter(combined)
    missing = [name for name in names if not isinstance(getattr(combined._iterator, name, None), list)]
    missing += [name for name in ("_mode", "_state_dicts", "_load_state_dicts") if not hasattr(combined, name)]
    assert not missing, f"CombinedLoader has no {missing} any more: see callbacks/memory_checkpoint/_seams.py"


def test_a_fetcher_tells_before_it_fetches_ahead():
    fetchers, combined = submodule("loops.fetchers"), submodule("utilities.combined_loader").CombinedLoader(iter([1, 2]))
    fetcher, told = fetchers._PrefetchDataFetcher(), []
    fetcher.setup(combined)
    fetcher._start_profiler = lambda: told.append(fetcher.fetched)
    iter(fetcher)
    assert (told, fetcher.length) == ([0], None)


def test_a_loader_looks_its_sampler_up_in_its_own_dictionary():
    """When it makes an iterator: a sampler that is put there leaves out batches."""
    loader = DataLoader(range(4), batch_size=2)
    vars(loader)["batch_sampler"] = [[3]]
    assert [batch.tolist() for batch in loader] == [[3]]


def test_a_loaded_checkpoint_stays_where_no_path_is_given(trainer):
    """`setup` puts it there; what is restored later must not throw it away."""
    trainer._checkpoint_connector._loaded_checkpoint = {"epoch": 1}
    trainer._checkpoint_connector.resume_start(None)
    assert trainer._checkpoint_connector._loaded_checkpoint == {"epoch": 1}


def test_sums_of_an_epoch_are_states_of_a_metric(trainer):
    results = submodule("trainer.connectors.logger_connector.result")
    collection = results._ResultCollection(training=True)
    collection.batch_size = 3
    collection.log("training_step", "loss", torch.tensor(2.0), on_epoch=True)
    metric = collection["training_step.loss"]
    assert set(metric._defaults) == {"value", "cumulated_batch_size"}
    assert (float(metric.value), int(metric.cumulated_batch_size), metric._update_count, metric.has_reset) == (6.0, 3, 1, False)


def test_metrics_keep_their_states_as_attributes():
    metric = MeanMetric()
    metric.update(torch.tensor(3.0))
    assert set(metric._defaults) == {"mean_value", "weight"}
    assert (float(metric.mean_value), metric._update_count, metric.state_dict()) == (3.0, 1, {})


def test_ddp_has_what_a_replay_of_its_first_pass_needs():
    missing = [name for name in ("prepare_for_forward", "prepare_for_backward") if not hasattr(dist.Reducer, name)]
    source = inspect.getsource(nn.parallel.DistributedDataParallel.__init__)
    missing += [name for name in ("self._comm_hooks", "self.find_unused_parameters") if name not in source]
    assert not missing, f"DDP has no {missing} any more: see callbacks/memory_checkpoint/_ddp_seams.py"
