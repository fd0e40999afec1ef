"""Steps on disk: which there are, whether they are whole, and which are kept. No torch here, so that listing them is quick.

    <disk_dir>/run.json                 whose steps these are
    <disk_dir>/step-000000100/          made under a name that begins with a dot, then renamed
        shared.distcp, rank0.distcp     a file a shard
        .metadata                       for torch.distributed.checkpoint; never read here, since it is a pickle
        manifest.json                   sizes and checksums of the other files, and a digest of itself

A folder counts if its manifest is in order and names the step that the folder is called by.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES, first_damage
from lightning_plugins.engines.resilience.slots import DamagedError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
PREFIX = "step-"
_LONGEST_MANIFEST_BYTES = 256 << 20
_CHUNKS_CACHED = 8


class DamagedFileError(DamagedError):
    """A file on disk is not what was written; the sentence names it.

    Attributes:
        shard: name of the file.
        step: that it belongs to; -1 if no folder of a step says so.
        chunk: number of the 4 MiB that differ, counted from 0; None where the manifest or the length differ.
    """

    def __init__(self, path: Path, step: int, chunk: int | None, what: str) -> None:
        RuntimeError.__init__(self, f"{path} is damaged: it {what}; use another copy or an older step")
        self.shard, self.step, self.chunk = path.name, step, chunk


class StepOnDisk(NamedTuple):
    """One folder of a step.

    Attributes:
        path: the folder.
        step: number, by the folder's name.
        bytes: of all its files; 0 if the manifest is damaged, as for what follows.
        written_at: seconds since 1970.
        meta: plain values that came with the state.
        damage: what is wrong with it; empty if it is whole.
    """

    path: Path
    step: int
    bytes: int
    written_at: float
    meta: dict[str, Any]
    damage: str


def step_folder(disk_dir: str | Path, step: int) -> Path:
    """Return the folder of a step."""
    return Path(disk_dir) / f"{PREFIX}{step:09d}"


def steps(disk_dir: str | Path, *, thorough: bool = True) -> list[StepOnDisk]:
    """Return the steps of a folder, newest first; none if there is no such folder.

    Args:
        disk_dir: the folder.
        thorough: whether every byte is read; if not, only manifests and sizes are looked at.
    """
    found = []
    for number, path in numbered(Path(disk_dir)):
        try:
            manifest = verify(path) if thorough else check_sizes(path)
        except DamagedError as error:
            found.append(StepOnDisk(path, number, 0, 0.0, {}, str(error)))
        else:
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            found.append(StepOnDisk(path, number, size, manifest["written_at"], manifest["meta"], ""))
    return sorted(found, key=lambda one: one.step, reverse=True)


def verify(path: str | Path, *, cached: bool = True) -> dict[str, Any]:
    """Return the manifest of a step's folder after every byte has been compared with its checksum.

    Args:
        path: the folder.
        cached: whether the page cache may be read and filled; if not, the bytes come from the disk and leave no trace.

    Raises:
        DamagedFileError: naming the first file that differs, and the first chunk of 4 MiB in it.
    """
    path = Path(path)
    manifest = check_sizes(path)
    for name in manifest["files"]:
        with CheckedFile(path, name, manifest) as file:
            file.check_all(cached)
    return manifest


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a step's folder, if it is the one that was written for it.

    Raises:
        DamagedFileError: if it is missing, changed, of another format, or of another step.
    """
    path = Path(path)
    step = _step_of(path)
    try:
        with (path / MANIFEST).open("rb") as file:
            encoded = file.read(_LONGEST_MANIFEST_BYTES)
    except OSError as error:
        raise DamagedFileError(path / MANIFEST, step, None, f"cannot be read ({error.strerror})") from error
    try:
        manifest = json.loads(encoded)
        if encoded != encode_manifest(manifest):
            raise ValueError
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DamagedFileError(path / MANIFEST, step, None, "is not what was written") from error
    if manifest["format"] != FORMAT_VERSION:
        raise DamagedFileError(path / MANIFEST, step, None, f"has format {manifest['format']}, not {FORMAT_VERSION}")
    if manifest["step"] != step:
        raise DamagedFileError(path / MANIFEST, step, None, f"is the one of step {manifest['step']}")
    return dict(manifest)


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as it stands in its file, with a digest of all the rest of it."""
    body = json.dumps(
        {name: value for name, value in manifest.items() if name != "digest"}, separators=(",", ":"), sort_keys=True
    )
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"digest":"{digest}",{body[1:]}\n'.encode()


class CheckedFile:
    """A file of a step; no byte of it is handed out before the checksum of its chunk was compared.

    Args:
        path: the step's folder.
        name: the file's.
        manifest: of the folder.

    Raises:
        DamagedFileError: if it is missing or of another size.
    """

    def __init__(self, path: Path, name: str, manifest: dict[str, Any]) -> None:
        self.path, self.step = path / name, manifest["step"]
        entry = manifest["files"][name]
        self.bytes, self._checksums = entry["bytes"], entry["crc32"]
        self._chunk, self._held = -1, b""
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise DamagedFileError(self.path, self.step, None, f"cannot be read ({error.strerror})") from error
        found = os.fstat(self._file.fileno()).st_size
        if found != self.bytes:
            self._file.close()
            raise DamagedFileError(self.path, self.step, None, f"has {found} bytes instead of {self.bytes}")

    def __enter__(self) -> "CheckedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, offset: int, length: int) -> bytes:
        """Return a range of bytes.

        Raises:
            DamagedFileError: if a chunk that it touches is not what it was.
        """
        parts = []
        while length > 0:
            held = self._take(offset // CHUNK_BYTES)
            part = held[offset % CHUNK_BYTES :][:length]
            if not part:
                raise DamagedFileError(self.path, self.step, None, f"ends before byte {offset + length}")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def check_all(self, cached: bool = True) -> None:
        """Compare every chunk; ``cached`` as for ``verify``.

        Raises:
            DamagedFileError: naming the first that is not what it was.
        """
        for chunk in range(max(len(self._checksums), -(-self.bytes // CHUNK_BYTES))):
            if not cached and chunk % _CHUNKS_CACHED == 0:
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._take(chunk)
        if not cached:
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _take(self, chunk: int) -> bytes:
        if chunk != self._chunk:
            try:
                held = os.pread(self._file.fileno(), CHUNK_BYTES, chunk * CHUNK_BYTES)
            except OSError as error:
                raise DamagedFileError(self.path, self.step, chunk, f"cannot be read ({error.strerror})") from error
            if first_damage(held, self._checksums[chunk : chunk + 1]) is not None:
                raise DamagedFileError(self.path, self.step, chunk, f"differs in its chunk {chunk} of {len(self._checksums)}")
            self._chunk, self._held = chunk, held
        return self._held


def check_sizes(path: Path) -> dict[str, Any]:
    """Return the manifest of a step's folder after the sizes of all files have been compared.

    Raises:
        DamagedFileError: naming the first file that is missing or of another size.
    """
    manifest = read_manifest(path)
    for name in manifest["files"]:
        with CheckedFile(path, name, manifest):
            pass
    return manifest


def numbered(disk_dir: Path) -> list[tuple[int, Path]]:
    """Return numbers and folders of all steps, whole or not."""
    with suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(disk_dir)
        return [(int(name[len(PREFIX) :]), disk_dir / name) for name in names if re.fullmatch(rf"{PREFIX}\d{{9,18}}", name)]
    return []


def _step_of(path: Path) -> int:
    name = path.resolve().name
    return int(name[len(PREFIX) :]) if re.fullmatch(rf"{PREFIX}\d{{9,18}}", name) else -1
