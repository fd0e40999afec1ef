"""Whether all hosts of a job see one folder of steps: found out at the start, so that nobody waits for pieces that cannot come.

Node 0 makes the folder of the start, whose name nobody can guess, and tells it through the store; each host looks for it and
makes its own folder in it. A folder that is not shared, or that one host may not write, costs the disk tier, and is said once.
"""

import hashlib
import json
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import Store

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience import disk_folder, disk_pieces
from lightning_plugins.engines.resilience.disk_steps import MANIFEST, numbered
from lightning_plugins.engines.resilience.place import Place

MEET_S = 60.0
SEE_S = 5.0  # for a network file system to show a new name
_POLL_S = 0.1

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """What this start may do with a folder of steps.

    Attributes:
        start: folder of the start; None if not all hosts can write there.
        is_readable: whether all hosts find the same steps there.
    """

    start: Path | None
    is_readable: bool


def open_together(disk_dir: Path, owner: str, place: Place, store: Store) -> Opened:
    """Return what all hosts can do with a folder; to be called on every rank.

    Args:
        disk_dir: the folder.
        owner: name of the job in it.
        place: of this rank.
        store: reached by all ranks.

    Raises:
        InputError: on all ranks, if the folder is another job's.
        RuntimeError: of the store, if a host has not said within a minute what it sees.
    """
    store.set_timeout(timedelta(seconds=MEET_S))
    if place.rank == 0:
        _put(store, "disk/start", _begin(disk_dir, owner))
    begun = _get(store, "disk/start")
    if "refused" in begun:
        raise InputError(begun["refused"])
    if place.is_first_of_node:
        _put(store, f"disk/seen/{place.node}", _look(disk_dir, begun, place))
    seen = [_get(store, f"disk/seen/{node}") for node in range(place.nodes)]
    reasons = [one["reason"] for one in seen if one["reason"]]
    # Without the start's folder, as on a full disk, the same manifests on all hosts mean the same steps.
    same = len({one["steps"] for one in seen}) == 1
    start = disk_dir / begun["start"] if not reasons else None
    if reasons and place.rank == 0:
        log.warning("no states go to disk in this run: %s", "; ".join(dict.fromkeys(reasons)))
        if "start" in begun:
            disk_pieces.remove_start(disk_dir / begun["start"])
    return Opened(start, all(one["sees"] for one in seen) or same)


def host_name(node: int) -> str:
    """Return how the log calls this host."""
    return f"host {node} ({socket.gethostname()})"


def _begin(disk_dir: Path, owner: str) -> dict[str, str]:
    try:
        disk_folder.claim(disk_dir, owner)
        return {"start": disk_pieces.make_start(disk_dir).name}
    except OSError as error:
        return {"failed": str(disk_folder.refusal(disk_dir, error))}
    except InputError as error:
        return {"failed" if isinstance(error.__cause__, OSError) else "refused": str(error)}


def _look(disk_dir: Path, begun: dict[str, str], place: Place) -> dict[str, Any]:
    found = {"steps": "", "sees": False, "reason": begun.get("failed", "")}
    try:
        found["steps"] = _digest(disk_dir)
    except OSError as error:
        found["reason"] = found["reason"] or f"{host_name(place.node)}: {disk_folder.refusal(disk_dir, error)}"
        return {**found, "steps": f"unreadable on host {place.node}"}
    if "start" in begun:
        found["sees"] = _sees(disk_dir, begun["start"])
        if not found["sees"]:
            found["reason"] = (
                f"{host_name(place.node)} does not see in {disk_dir} what host 0 has written there; give a disk_dir on storage "
                "that all hosts share, or disk_dir=False"
            )
        else:
            try:
                disk_pieces.node_folder(disk_dir / begun["start"], place.node).mkdir()
            except OSError as error:
                found["reason"] = f"{host_name(place.node)}: {disk_folder.refusal(disk_dir, error)}"
    return found


def _sees(disk_dir: Path, name: str) -> bool:
    deadline = time.monotonic() + SEE_S
    while True:
        with suppress(OSError):
            if name in os.listdir(disk_dir):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)


def _digest(disk_dir: Path) -> str:
    digest = hashlib.sha256()
    for step, path in sorted(numbered(disk_dir)):
        with suppress(OSError):
            digest.update(f"{step} ".encode() + (path / MANIFEST).read_bytes())
    return digest.hexdigest()


def _put(store: Store, key: str, value: dict[str, Any]) -> None:
    store.set(key, json.dumps(value))


def _get(store: Store, key: str) -> dict[str, Any]:
    return dict(json.loads(bytes(store.get(key))))
