"""A step of several hosts on storage that all of them see: each writes a piece, and node 0 makes one step of the pieces.

    <disk_dir>/.start-000007-0a1b2c3d4e5f6071/     one for each start of the job
        node1/step-000000100/                      a piece: files of shards, and a manifest with its part of torch's metadata
        last                                       written after the trainers' death: which step is to be finished

A piece has its name once all of it is on the disk, and its manifest names the start; the states in it name the start as well. So
nothing that an earlier start left behind, even of the same step, gets into a step. Node 0 moves the files of all pieces into one
folder and writes torch's metadata, the manifest and the folder's name last, as for a step of one host.

Folders of starts are numbered. With its first step a start removes those before it, and a writer without its folder writes no
more: so an earlier start that is late cannot replace what a later one has written. A step is made in the start's folder, too: so
all of this holds where the file system has no locks, as many that are shared.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import failpoint
from lightning_plugins.engines.resilience import disk_folder
from lightning_plugins.engines.resilience.disk import (
    check_values,
    new_manifest,
    publish,
    write_ends,
    write_manifest,
    write_shards,
)
from lightning_plugins.engines.resilience.disk_keys import KeyTable
from lightning_plugins.engines.resilience.disk_steps import DamagedFileError, check_sizes, numbered, read_manifest, step_folder

GATHER_S = 120.0  # for the pieces of other nodes, once node 0 has written its own
PREFIX = ".start-"
_POLL_S = 0.05
_LAST = "last"


class Share(NamedTuple):
    """What a writer has to do with the steps of several hosts.

    Attributes:
        start: folder of this start, see ``make_start``.
        node: number of this host; 0 completes the steps.
        nodes: number of hosts.
        gather_s: how long other hosts are waited for.
    """

    start: str
    node: int
    nodes: int
    gather_s: float = GATHER_S


class IncompleteError(RuntimeError):
    """A piece of a step has not come, so there is no such step."""


def make_start(disk_dir: Path) -> Path:
    """Make the folder of a start of the job, with a higher number than those that are there.

    Raises:
        OSError: if it cannot be made.
    """
    path = disk_dir / f"{PREFIX}{_number(max(_starts(disk_dir), default=PREFIX)) + 1:06d}-{secrets.token_hex(8)}"
    path.mkdir()
    return path


def write_piece(share: Share, step: int, shards: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write what this node has of a step; pieces that have not become part of a step are removed first.

    Args:
        share: of this node.
        step: number.
        shards: see ``disk.write_step``.
        meta: plain values; the same on all nodes.

    Raises:
        InputError: for bad values; if a later start has removed this one's folder, or the disk is full or read-only.
    """
    check_values(step, shards)
    folder = node_folder(share.start, share.node)

    def fill(temporary: Path) -> None:
        keys, manifest = KeyTable(), new_manifest(step, meta)
        write_shards(temporary, shards, keys, manifest)
        write_manifest(temporary, {**manifest, "start": Path(share.start).name, "node": share.node, "keys": keys.plain()})

    with _as_current(share, folder):
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            shutil.rmtree(path)
        failpoint("resilience/disk/piece")
        disk_folder.fill_and_move(step_folder(folder, step), fill)


def complete(disk_dir: Path, share: Share, step: int, keep: int, past: int | None, given_up: Callable[[int], str]) -> None:
    """Wait for the pieces of a step and make the step of them; for node 0 alone.

    Args:
        disk_dir: folder of the job's steps.
        share: of this node.
        step: number.
        keep: see ``disk.write_step``.
        past: likewise.
        given_up: returns why a step is not to be waited for any more; nothing as long as it is.

    Raises:
        IncompleteError: if a piece does not come.
        InputError: as ``write_piece``.
        DamagedFileError: if a piece is not what was written, or the disk does not give back the step.
    """
    deadline = time.monotonic() + share.gather_s
    disk_folder.sweep(Path(share.start))  # only node 0's writer makes anything there
    pieces = [_await_piece(share, node, step, deadline, given_up) for node in range(share.nodes)]
    if any(piece["meta"] != pieces[0]["meta"] for piece in pieces):
        raise IncompleteError(f"the pieces of step {step} are of different captures")

    def fill(folder: Path) -> None:
        _remove_starts_before(disk_dir, Path(share.start).name)
        keys, manifest = KeyTable(), new_manifest(step, pieces[0]["meta"])
        for node, piece in enumerate(pieces):
            keys.add_plain(piece["keys"])
            manifest["shards"].update(piece["shards"])
            manifest["files"].update(piece["files"])
            _move_files(step_folder(node_folder(share.start, node), step), folder, piece["files"])
            failpoint("resilience/disk/piece_moved")
        write_ends(folder, keys, manifest)

    with _as_current(share, disk_dir):
        publish(disk_dir, step, fill, keep, past, within=Path(share.start))


def is_written(disk_dir: Path, share: Share, step: int) -> bool:
    """Return whether a step of this very start is on the disk."""
    with suppress(DamagedFileError):
        return bool(read_manifest(step_folder(disk_dir, step))["meta"].get("start") == Path(share.start).name)
    return False


def has_piece(share: Share, step: int) -> bool:
    """Return whether this node's piece of a step is there."""
    return step_folder(node_folder(share.start, share.node), step).exists()


def announce_last(share: Share, step: int) -> None:
    """Say which step all nodes finish now that the trainers are dead, -1 for none.

    Raises:
        OSError: if it cannot be written.
    """
    with atomic_write(Path(share.start) / _LAST, "w") as file:
        file.write(str(step))


def await_last(share: Share) -> int:
    """Return which step node 0 wants finished, -1 for none.

    Raises:
        IncompleteError: if node 0 does not say.
    """
    deadline = time.monotonic() + share.gather_s
    while time.monotonic() < deadline and Path(share.start).is_dir():
        if _LAST in os.listdir(share.start):
            return int((Path(share.start) / _LAST).read_text())
        time.sleep(_POLL_S)
    raise IncompleteError(f"node 0 has not said within {share.gather_s:g} s which step is the last")


def node_folder(start: str | Path, node: int) -> Path:
    """Return the folder of a node's pieces."""
    return Path(start) / f"node{node}"


def _await_piece(share: Share, node: int, step: int, deadline: float, given_up: Callable[[int], str]) -> dict[str, Any]:
    """Return the manifest of a node's piece once it is there."""
    folder = node_folder(share.start, node)
    while True:
        # Listed, since a network file system may remember for long that a single name was not there.
        there = [number for number, _ in numbered(folder)]
        if step in there:
            return _read_piece(share, node, step_folder(folder, step))
        if max(there, default=-1) > step:
            raise IncompleteError(f"node {node} has left out step {step}")
        if not Path(share.start).is_dir():
            raise _gone(share)
        if reason := given_up(step):
            raise IncompleteError(reason)
        if time.monotonic() > deadline:
            raise IncompleteError(f"node {node} has not written its piece of step {step} within {share.gather_s:g} s")
        time.sleep(_POLL_S)


def _read_piece(share: Share, node: int, path: Path) -> dict[str, Any]:
    manifest = check_sizes(path)
    if (manifest.get("start"), manifest.get("node")) != (Path(share.start).name, node):
        raise DamagedFileError(path, manifest["step"], None, f"is of {manifest.get('start')}, node {manifest.get('node')}")
    if wrong := [name for name in manifest["files"] if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}\.distcp", name)]:
        raise DamagedFileError(path, manifest["step"], None, f"names files {wrong}")
    return manifest


def _move_files(piece: Path, folder: Path, names: Mapping[str, Any]) -> None:
    """Take a piece away in one go, so that one without its files is never taken for whole, and then its files out of it."""
    taken = folder / ".taken"
    os.rename(piece, taken)
    for name in names:
        os.rename(taken / name, folder / name)
    shutil.rmtree(taken)


@contextmanager
def _as_current(share: Share, folder: Path) -> Iterator[None]:
    """Write into ``folder`` as long as this is the last start; that it is not any more is said in one way."""
    if not Path(share.start).is_dir():
        raise _gone(share)
    try:
        yield
    except (OSError, InputError) as error:
        if not Path(share.start).is_dir():
            raise _gone(share) from error
        raise disk_folder.refusal(folder, error) if isinstance(error, OSError) else error from error.__cause__


def _gone(share: Share) -> InputError:
    return InputError(f"{share.start} is not there any more; a later start of the run writes here now, or has ended")


def _remove_starts_before(disk_dir: Path, name: str) -> None:
    for one in _starts(disk_dir):
        if one < name:
            _remove(disk_dir / one)
    for half_removed in disk_dir.glob(f"{PREFIX}*{disk_folder.UNFINISHED}"):
        shutil.rmtree(half_removed, ignore_errors=True)


def _remove(start: Path) -> None:
    """Remove a start's folder in one go, so that nothing of it can be moved out while it is half there."""
    doomed = start.with_name(f"{start.name}{disk_folder.UNFINISHED}")
    with suppress(OSError):
        os.rename(start, doomed)
        failpoint("resilience/disk/start_removed")
    shutil.rmtree(doomed, ignore_errors=True)


def remove_start(start: Path) -> None:
    """Remove the folder of a start that has ended, and those before it, as far as that can be done."""
    with suppress(OSError):
        _remove_starts_before(start.parent, start.name)
    _remove(start)


def remove_starts(disk_dir: Path) -> None:
    """Remove the folders of all starts on several hosts, whose writers write no more then: a run on one host begins to write.

    Raises:
        OSError: if the folder cannot be read.
    """
    _remove_starts_before(disk_dir, PREFIX + "~")


def _starts(disk_dir: Path) -> list[str]:
    return [name for name in os.listdir(disk_dir) if re.fullmatch(rf"{re.escape(PREFIX)}\d{{6}}-[0-9a-f]{{16}}", name)]


def _number(name: str) -> int:
    return int(name[len(PREFIX) :].partition("-")[0] or 0)
