"""What the launching tests start: the command line in a process of its own, with small recipes, YAML files and scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What every Python started in a folder with a recipe of its own runs first: one more recipe, ``tiny``.
SITE = """
from lightning_plugins import recipes
from lightning_plugins._support.methods import RECIPES, Recipe
recipes.__path__.append({folder!r})
RECIPES["tiny"] = Recipe("a recipe for tests", "tiny", {processes})
"""


def command(folder, *words, recipe=None, processes=1):
    """Return the command line for `lightning WORDS`; ``recipe`` is the source of a recipe called ``tiny``.

    It starts ``processes`` where nobody says how many.
    """
    if recipe is not None:
        site = folder / "site"
        site.mkdir(exist_ok=True)
        (site / "tiny.py").write_text(recipe)
        (site / "sitecustomize.py").write_text(SITE.format(folder=str(site), processes=processes))
    return [sys.executable, "-m", "lightning_plugins.cli", *map(str, words)]


def environment(folder, **changes):
    """Return this environment without what a launcher or a user would have set."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK")}
    return {**kept, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **changes}


def lightning(folder, *words, recipe=None, processes=1, **changes):
    """Run `lightning WORDS` in ``folder`` and return the finished process."""
    return subprocess.run(
        command(folder, *words, recipe=recipe, processes=processes),
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(folder, **changes),
        check=False,
    )


def signalled(folder, number, *words, recipe=None, sign="ready"):
    """Start `lightning WORDS`, send it a signal once it printed ``sign``; return exit code, output and errors."""
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        child = subprocess.Popen(
            command(folder, *words, recipe=recipe),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(folder),
        )
        try:
            deadline = time.monotonic() + 60
            while sign not in (folder / "out").read_text() and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            child.send_signal(number)
            code = child.wait(30)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
    return code, (folder / "out").read_text(), (folder / "err").read_text()


def only_run(folder, name):
    """Return the path of the one run of ``name`` under ``folder/runs``."""
    (path,) = (folder / "runs" / name).iterdir()
    return path


def wait_for(condition, seconds=100):
    """Wait until a run has come so far."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.01)
