"""The benchmark of levelling speed in its short form: it runs, says what it measured, and judges by the goals."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cv2")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    specification = importlib.util.spec_from_file_location("upright_speed", BENCHMARKS / "upright_speed.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_short_form_measures_all_and_writes_nothing():
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / "upright_speed.py"), "--tiny", "--height", "32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    on_cpu = [line.split()[:2] for line in done.stdout.splitlines() if " cpu " in line]
    expected = [
        ["end_to_end", "analytic"],
        ["table", "analytic"],
        ["end_to_end", "learned"],
        ["table", "learned"],
        ["video", "cpu"],
    ]
    assert on_cpu == expected
    assert {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()} == before


@pytest.mark.parametrize(
    ("what", "table", "device", "taken_s", "goal", "verdict"),
    [
        ("end_to_end", "learned", "cpu", 1 / 15.1, ">= 15 frames/s", "held"),
        ("end_to_end", "analytic", "cpu", 1 / 14.9, ">= 15 frames/s", "MISSED"),
        ("video", "", "cpu", 1 / 14.9, ">= 15 frames/s", "MISSED"),
        ("table", "analytic", "cpu", 0.0049, "< 5 ms", "held"),
        ("table", "analytic", "cpu", 0.0051, "< 5 ms", "MISSED"),
        ("table", "learned", "cpu", 0.0051, "", ""),
        ("end_to_end", "analytic", "cuda", 1.0, "", ""),
    ],
)
def test_goals_are_judged(benchmark, what, table, device, taken_s, goal, verdict):
    row = benchmark.row(what, table, device, 256, 128, taken_s)
    assert (row["goal"], row["verdict"]) == (goal, verdict)
    assert float(row["ms"]) == pytest.approx(1e3 * taken_s, abs=1e-3)
