"""The benchmark of the level images in its short form, and its rows on images whose answer is known."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_plugins import PanoramicUpright

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import upright_reconstruction

    return upright_reconstruction


def run(*options):
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "LIGHTNING_PLUGINS_NAMESPACE": "pytorch_lightning"}
    command = [sys.executable, str(BENCHMARKS / "upright_reconstruction.py"), "--tiny", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_short_form_with_a_checkpoint(tmp_path):
    PanoramicUpright(widths=[8, 12], blocks=1, image_height=32, reconstruct=True).deploy(tmp_path / "new.ckpt")
    done = run("--ckpt", str(tmp_path / "new.ckpt"))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = done.stdout.splitlines()
    assert [sum(row.startswith(check) for row in rows) for check in ("round trip", "camera", "table")] == [10, 8, 2]
    # A refiner that has learned nothing is plain resampling, and the gate cannot be wrong.
    assert [row for row in rows if "gated  true" in row and "worst_gain_db 0.00" in row and row.endswith("1.000  0.000")]


def test_a_checkpoint_without_a_refiner_is_refused(tmp_path):
    PanoramicUpright(widths=[8, 12], blocks=1, image_height=32).deploy(tmp_path / "plain.ckpt")
    done = run("--ckpt", str(tmp_path / "plain.ckpt"))
    assert done.returncode != 0
    assert "holds no refiner; give the checkpoint of a PanoramicUpright(reconstruct=True)" in done.stderr


def test_a_residual_is_as_large_as_it_says(benchmark):
    up = torch.nn.functional.normalize(torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64), dim=-1)
    for degrees in (0.0, 0.5, 5.0):
        other = benchmark.off_by(up.float(), degrees).double()
        assert other.norm().item() == pytest.approx(1, abs=1e-6)
        angle = math.atan2(torch.linalg.cross(up, other).norm().item(), (up * other).sum().item())
        assert math.degrees(angle) == pytest.approx(degrees, abs=1e-4)


def test_a_larger_residual_costs_more(benchmark):
    rows = [*benchmark.round_trips([*benchmark.rooms(1, 64)])]
    for reading in ("bilinear", "bicubic"):
        figures = [float(row["psnr_db"]) for row in rows if row["image"] == reading]
        assert figures == sorted(figures, reverse=True)
    assert float(rows[5]["psnr_db"]) > float(rows[0]["psnr_db"]), "bicubic loses less than bilinear"
