"""What OkTopkStrategy says of itself: logs, its name, and what can be read between two steps."""

import csv
import time
from pathlib import Path

import pytest

from lightning_plugins import OkTopkFabricStrategy, OkTopkStrategy
from lightning_plugins._lightning import NAMESPACE, CSVLogger
from lightning_plugins.engines.sparse_allreduce import OkTopkState
from lightning_plugins.engines.sparse_allreduce.backward_pass import BackwardPass
from tests.strategies.ok_topk_parts import BUCKETS, OPTIONS, Net, assert_same, fit

pytestmark = pytest.mark.adapter

KEYS = {
    *("selected_over_k", "reached_over_k", "selected_globally_over_k", "load_imbalance", "residual_over_gradient"),
    *("gradient_norm", "assumption_ratio", "sent_mb", "received_mb", "skipped_count"),
}


class Watched(Net):
    """Keeps what is logged after each step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        metrics = self.trainer.callback_metrics
        self.seen.append({name: float(value) for name, value in metrics.items() if name.startswith("ok_topk/")})


CASES = {
    "each": ({"log_every": 1}, {}),
    "second": ({"log_every": 2}, {}),
    "late": ({"log_every": 2, "dense_steps": 3}, {}),
    "left out": ({"log_every": 2}, {"bad": {(2, 1)}}),
    "each, left out": ({"log_every": 1}, {"bad": {(2, 1)}}),
    "never": ({"log_every": 0}, {}),
}


def log(rank, world_size, folder, assumption_every, names):
    found = {}
    for name in names:
        options, module = CASES[name]
        logger = CSVLogger(folder, name=name, version=rank)
        watched = Watched(**module)
        strategy = OkTopkStrategy(**OPTIONS, assumption_every=assumption_every, **options, **BUCKETS)
        fit(watched, world_size, strategy, logger=logger, log_every_n_steps=1)
        found[name] = watched.seen
    return found


def test_all_that_is_promised_is_logged_in_its_interval(ranks, tmp_path):
    promised = {f"ok_topk/{key}" for key in KEYS}
    for found in ranks.run(log, 2, str(tmp_path), 2, ["each", "second"]):
        for name in ("each", "second"):
            for seen in found[name][1:]:
                assert {f"ok_topk/{phase}_ms" for phase in ("accumulate", "select", "split_and_reduce")} <= seen.keys()
                assert promised <= seen.keys(), f"{name}: {promised - seen.keys()} is missing"
    with Path(tmp_path, "second", "version_0", "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(any(row[key] for row in rows) for key in promised)


def test_bytes_are_those_of_a_step_whatever_was_left_out_or_dense_before(ranks, tmp_path):
    for found in ranks.run(log, 2, str(tmp_path), 0, list(CASES)):
        assert not any(found["never"])
        assert not found["second"][0], "nothing after the first step"
        assert found["second"][1] == found["second"][2] != found["second"][3]
        assert [seen.get("ok_topk/skipped_count") for seen in found["left out"]] == [None, 0, 0, 1, 1, 1]
        for key in ("ok_topk/sent_mb", "ok_topk/received_mb"):
            each = [seen[key] for seen in found["each"]]
            each_left_out = [seen[key] for seen in found["each, left out"]]
            assert each_left_out[2] < each[2] / 10, "a step that is left out sends next to nothing"
            for step in (1, 3, 5):
                assert found["second"][step][key] == pytest.approx((each[step - 1] + each[step]) / 2, abs=1e-9)
                mean = (each_left_out[step - 1] + each_left_out[step]) / 2
                assert found["left out"][step][key] == pytest.approx(mean, abs=1e-9)
            dense, both, _ = (found["late"][step][key] for step in (1, 3, 5))
            assert dense == pytest.approx(1e-6 * 4 * 531, rel=0.05), "a half of 4 n to each rank, and a half from each"
            assert both == pytest.approx((dense + each[0]) / 2, rel=0.2)


class Between(Net):
    """Reads the state after each step, as a callback that captures it does."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        state = self.trainer.strategy.rank_state_dict()
        assert state["steps"] == self.global_step, f"{state['steps']} after step {self.global_step}"
        assert [name for segment in state["segments"] for name in segment] == list(state["residual"])


def read_between(rank, world_size):
    """Let the worker take its time where the step is done for all who wait."""
    found = []
    finish, rearrange = BackwardPass._finish, OkTopkState.rearrange
    for late in (False, True):
        if late:
            BackwardPass._finish = lambda self: (time.sleep(0.2), finish(self))
            OkTopkState.rearrange = lambda self, segments: (time.sleep(0.2), rearrange(self, segments))
        strategies = [OkTopkStrategy(**OPTIONS, dense_steps=dense, **BUCKETS) for dense in (0, 2)]
        found.append([fit(Between(), world_size, strategy, max_steps=3) for strategy in strategies])
    return found


def test_what_is_read_after_a_step_is_whole_and_of_that_step(ranks):
    for prompt, late in ranks.run(read_between, 2):
        for of_prompt, of_late in zip(prompt, late, strict=True):
            assert_same(of_late, of_prompt)


@pytest.mark.parametrize("strategy", [OkTopkStrategy, OkTopkFabricStrategy])
def test_the_name_says_what_was_chosen_and_which_lightning_it_is_for(strategy):
    text = repr(strategy(0.02, mode="global", log_every=7, find_unused_parameters=True))
    for part in (strategy.__name__, "density=0.02", "mode='global'", "log_every=7", "find_unused_parameters=True"):
        assert part in text
    assert "threshold='servo'" in text
    assert "threshold_every=32" in text
    assert f"built for {NAMESPACE}" in text
