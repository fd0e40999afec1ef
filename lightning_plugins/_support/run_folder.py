"""The folder of one run, ``runs/<recipe>/<date-time>/``: made once by the launcher, found again by ``--resume``."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError

STATE_FILE = "run.json"
CONFIG_FILE = "config.yaml"


@dataclass
class RunFolder:
    """A run's folder and its record of finished phases.

    ``run.json`` holds the recipe, the target as it was given, its options, the working directory that they are relative to,
    and the phases that are finished, so that ``--resume`` goes on at the first unfinished one with the same options.
    """

    path: Path

    @classmethod
    def create(
        cls,
        root: str | Path,
        recipe: str,
        options: list[str],
        now: datetime | None = None,
        target: str | None = None,
        shared_name: str | None = None,
    ) -> "RunFolder":
        """Make ``root/recipe/<date-time>`` (with ``-2``, ``-3`` ... if that exists).

        Args:
            root: the folder of all runs.
            recipe: the name of the recipe, or of the YAML without its ending.
            options: what the target was given, to be given again by ``--resume``.
            now: the time to name the folder by.
            target: what to start again on ``--resume``: the recipe, or the whole path of a YAML; the recipe if None.
            shared_name: the folder's name instead of the time, where the launchers of several machines make it together.

        Raises:
            InputError: if the folder cannot be made or written.
        """
        stamp = (now or datetime.now()).strftime("%Y-%m-%d_%H-%M-%S")
        parent = Path(root) / recipe
        record = {"recipe": recipe, "target": target or recipe, "options": options, "directory": os.getcwd(), "finished": []}
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if shared_name is not None:
                return cls._join((parent / shared_name).resolve(), record)
            for count in range(1, 1000):
                path = parent / (stamp if count == 1 else f"{stamp}-{count}")
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                run = cls(path.resolve())
                run._write(record)
                return run
        except OSError as error:
            reason = f"{error.strerror or error}"
            raise InputError(
                f"the run folder {parent} cannot be written ({reason}); choose another place with --runs-dir DIR"
            ) from error
        raise InputError(f"{parent} already holds 999 runs of {stamp}; choose another place with --runs-dir DIR")

    @classmethod
    def _join(cls, path: Path, record: dict[str, Any]) -> "RunFolder":
        run = cls(path)
        path.mkdir(exist_ok=True)
        if not (path / STATE_FILE).exists():
            run._write(record)
        elif {**run.read(), "directory": record["directory"]} != record:  # the same folder has other names on other machines
            raise InputError(
                f"{path} is the folder of another run; give this one a --rdzv-id of its own, or go on with --resume {path}"
            )
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open the folder of an earlier run.

        Raises:
            InputError: if it is no run folder.
        """
        run = cls(Path(path).resolve())
        try:
            state = run.read()
        except (OSError, ValueError) as error:
            raise InputError(
                f"--resume got {path}, which holds no readable {STATE_FILE}; give the run folder that the killed run printed"
            ) from error
        if not isinstance(state, dict) or not {"recipe", "target", "options", "directory", "finished"} <= set(state):
            raise InputError(
                f"{run.path / STATE_FILE} is not the record of a run; give the run folder that the killed run printed"
            )
        return run

    def read(self) -> dict[str, Any]:
        """Return the record: ``recipe``, ``target``, ``options``, ``directory`` and ``finished``."""
        return json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))

    def is_finished(self, phase: str) -> bool:
        """Tell whether ``phase`` was marked finished, in this process or an earlier one."""
        return phase in self.read()["finished"]

    def finish(self, phase: str) -> None:
        """Mark ``phase`` finished."""
        state = self.read()
        if phase not in state["finished"]:
            state["finished"].append(phase)
            self._write(state)

    def discard_unused(self) -> None:
        """Remove the folder if it holds nothing but its record: the run was refused before it wrote anything.

        The recipe's folder goes too if this was its only run.
        """
        with suppress(OSError):  # it may be why the run was refused
            if [entry.name for entry in self.path.iterdir()] == [STATE_FILE]:
                (self.path / STATE_FILE).unlink()
                self.path.rmdir()
                self.path.parent.rmdir()

    def _write(self, state: dict[str, Any]) -> None:
        with atomic_write(self.path / STATE_FILE, "w") as file:
            json.dump(state, file, indent=2)
