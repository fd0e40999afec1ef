"""Files beside a checkpoint that hold what differs by rank: ``<checkpoint>.ok_topk/<token>/rank0000.pt``.

The checkpoint names the token of the files that belong to it. They are complete before the checkpoint is written, by plugins that
write at once, and those of an overwritten checkpoint stay until the next save: whenever a run is killed, the checkpoint that is
found has its own files. With ``AsyncCheckpointIO`` each rank's writes keep their order, but ranks do not wait for each other.
"""

from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec

from lightning_plugins._support.errors import InputError

KEY = "ok_topk"
KEPT = 2  # tokens of one checkpoint: its own, and that of the one it overwrites, which a slow writer may not have replaced yet


def new_token() -> str:
    """Return a name for the files of one save."""
    return uuid4().hex


def folder_of(checkpoint: str | Path) -> str:
    """Return the folder that holds the files of a checkpoint and of those that it overwrote."""
    return f"{checkpoint}.{KEY}"


def file_of(checkpoint: str | Path, token: str, rank: int) -> str:
    """Return the file of a rank."""
    return f"{folder_of(checkpoint)}/{token}/rank{rank:04d}.pt"


def remove_older(checkpoint: str | Path, token: str) -> None:
    """Remove the files of all saves but the newest ones."""
    system, folder = fsspec.core.url_to_fs(folder_of(checkpoint))
    if not system.exists(folder):  # a plugin that writes later has not come to it yet
        return
    others = [entry for entry in system.ls(folder, detail=True) if not entry["name"].endswith(token)]
    others.sort(key=lambda entry: str(entry.get("mtime", entry.get("created", ""))))
    for entry in others[: max(0, len(others) - KEPT + 1)]:
        system.rm(entry["name"], recursive=True)


def find(checkpoint: str | Path, token: str, ranks: int) -> list[str] | None:
    """Return the files of all ranks, or None if some are missing; a linked checkpoint has them beside what it links to.

    Raises:
        InputError: if the token is no name that `new_token` gives.
    """
    if not token.isalnum():
        raise InputError(f"{checkpoint} names {token!r} as its folder of residuals, which it cannot have written; do not load it")
    places = [str(checkpoint)]
    if Path(str(checkpoint)).is_symlink():
        places.append(str(Path(str(checkpoint)).resolve()))
    for place in places:
        files = [file_of(place, token, rank) for rank in range(ranks)]
        if all(fsspec.core.url_to_fs(file)[0].exists(file) for file in files):
            return files
    return None


def described(token: str, ranks: int) -> dict[str, Any]:
    """Return what a checkpoint says of its files."""
    return {"token": token, "ranks": ranks}
