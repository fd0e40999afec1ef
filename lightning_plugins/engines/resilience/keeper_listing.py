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
    """

    job: str
    bytes: int
    keeper_pid: int


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
                return [JobInMemory(job, size, answer[0]["pid"]) for job, size in sorted(answer[0]["jobs"].items())]
    return []
