"""The benchmark of up in its short form, on models that were never trained."""

import os
import subprocess
import sys
from pathlib import Path

from lightning_plugins import PanoramicUpright

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_short_form_judges_every_predictor(tmp_path):
    model = tmp_path / "new.ckpt"
    PanoramicUpright(widths=[8, 12], blocks=1, image_height=32).deploy(model)
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "LIGHTNING_PLUGINS_NAMESPACE": "pytorch_lightning"}
    command = [sys.executable, str(BENCHMARKS / "upright.py"), "--tiny", "--small", str(model), "--mixed", str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row.split(maxsplit=2) for row in done.stdout.splitlines() if row.startswith("rooms")]
    judged = {
        (tilt, predictor)
        for _, tilt, rest in rows
        for predictor in ("network for any", "network", "lines", "identity")
        if rest.startswith(predictor)
    }
    assert {
        ("small", "network for any"),
        *((tilt, name) for tilt in ("small", "sphere") for name in ("network", "lines", "identity")),
    } <= judged
    assert "left alone as level:" in done.stdout
