"""What this user's keeper holds, asked without starting one, and without being a client of any of its jobs. No torch here."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lightning_plugins.engines.resilience.keeper_folder import KeeperError, _default_folder, connect
from lightning_plugins.engines.resilience.messages import MalformedError, receive, send

_ANSWER_S = 10.0


class JobInMemory(NamedTuple):
    """One job of a keeper.

    Attributes:
        job: name.
        bytes: of its slots, used or not.
        keeper_pid: the keeper's process.
        steps: the whole ones, newest first.
    """

    job: str
    bytes: int
    keeper_pid: int
    steps: list["StepInMemory"]


class StepInMemory(NamedTuple):
    """One step of a job.

    Attributes:
        step: number.
        shards: how many of it this host has.
        is_committed: whether all ranks had it, as far as this host was told.
        written_at: seconds since 1970.
    """

    step: int
    shards: int
    is_committed: bool
    written_at: float


def jobs_in_memory(folder: str | Path | None = None) -> list[JobInMemory]:
    """Return the jobs of the keeper, none if there is no keeper.

    Args:
        folder: where its socket is; None is the user's own.
    """
    path = _default_folder() if folder is None else Path(folder)
    with suppress(OSError, KeeperError, MalformedError):
        connection = connect(path)
        if connection is not None:
            with connection:
                send(connection, {"do": "status"})
                answer = receive(connection, _ANSWER_S)
            if answer is not None:
                status = answer[0]
                return [
                    JobInMemory(job, size, status["pid"], [StepInMemory(*step) for step in status["steps"].get(job, [])])
                    for job, size in sorted(status["jobs"].items())
                ]
    return []
