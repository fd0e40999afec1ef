"""A recipe run as a user runs it, timed from start to end."""

import subprocess
import sys
import time
from pathlib import Path


def run_recipe(name: str, options: list[str]) -> tuple[float, Path]:
    """Run ``lightning run <name>``; return its seconds, imports and rendering included, and its run folder."""
    command = [sys.executable, "-m", "lightning_plugins.cli", "run", name, *options]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return round(time.perf_counter() - start, 1), Path(done.stdout.strip().splitlines()[-1])
