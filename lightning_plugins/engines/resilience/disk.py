"""Training states on disk: written whole or not at all, read without a pickle, and readable by torch's own tools as well.

    write_step("steps", 100, {"shared": state, "rank0": own}, meta={"world_size": 1})
    state = read_step("steps/step-000000100", "shared")

A step is a folder, see ``disk_steps``. Each tensor stands in its shard's file as ``torch.save`` writes it, so that
``torch.distributed.checkpoint.load(state, checkpoint_id=FOLDER)`` finds it under its path: ``state_dict.net.0.weight``; keys of
other shards than "shared" begin with the shard's name. Pieces of sharded tensors (see ``tensor_pieces``) are chunks of one
whole tensor, under the path that it has in each shard. For our own reading the skeleton of ``state_tree`` stands beside them.

    write to .step-000000100.PID.part  ->  fsync of each file, of the folder  ->  rename  ->  fsync of disk_dir
    ->  read back from the disk  ->  only then are older steps removed
"""

import io
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import failpoint
from lightning_plugins.engines.resilience import disk_folder
from lightning_plugins.engines.resilience.disk_file import ChecksummedFile
from lightning_plugins.engines.resilience.disk_keys import KeyTable, Record
from lightning_plugins.engines.resilience.disk_steps import (
    FORMAT_VERSION,
    MANIFEST,
    CheckedFile,
    DamagedFileError,
    StepOnDisk,
    encode_manifest,
    read_manifest,
    step_folder,
    steps,
    verify,
)
from lightning_plugins.engines.resilience.state_tree import pack, unpack

__all__ = ["DamagedFileError", "StepOnDisk", "read_step", "steps", "verify", "write_step"]
METADATA = ".metadata"


def write_step(
    disk_dir: str | Path,
    step: int,
    shards: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
    keep: int = 2,
    *,
    past: int | None = None,
) -> Path:
    """Write a step, and remove older ones once it has been read back from the disk.

    Args:
        disk_dir: folder of the job's steps; it must exist, see ``disk_folder.claim``.
        step: number, 0 or more. Steps with a higher number are of a past that was given up, and are removed.
        shards: states as ``state_tree.pack`` takes them, by names of letters, digits, ``_`` and ``-``.
        meta: plain values that travel with it: what JSON holds.
        keep: how many whole steps are kept, this one included; 1 or more.
        past: with the first step of a run, the step that it went on from, -1 if it began afresh; steps above are removed.

    Returns:
        The step's folder.

    Raises:
        InputError: for bad values, and for a disk that is full or read-only: what was there before is there still.
        DamagedFileError: if the disk does not give back what was written; no older step is removed then.
    """
    check_values(step, shards)
    if keep < 1:
        raise InputError(f"keep must be 1 or more, got {keep}; keep=2 has an older one in reserve")

    def fill(folder: Path) -> None:
        keys, manifest = KeyTable(), new_manifest(step, meta)
        write_shards(folder, shards, keys, manifest)
        write_ends(folder, keys, manifest)

    return publish(Path(disk_dir), step, fill, keep, past)


def publish(
    disk_dir: Path, step: int, fill: Callable[[Path], None], keep: int, past: int | None, within: Path | None = None
) -> Path:
    """Give a step its name once its folder is filled; arguments and errors as for ``write_step``.

    Args:
        disk_dir: folder of the job's steps.
        step: number.
        fill: writes all files of the step into a folder; called while the lock on ``disk_dir`` is held.
        keep: how many whole steps are kept.
        past: the step that the run went on from.
        within: where the step is made; if it is not there any more, somebody else writes now, and no other step is removed. None
            is ``disk_dir``.
    """
    path = step_folder(disk_dir, step)
    try:
        with disk_folder.locked(disk_dir) as held:
            if held:
                disk_folder.sweep(disk_dir)
            disk_folder.fill_and_move(path, fill, within)
            verify(path, cached=False)
            failpoint("resilience/disk/verified")
            if within is None or within.is_dir():
                disk_folder.prune(disk_dir, step, keep, past)
    except OSError as error:
        raise disk_folder.refusal(disk_dir, error) from error
    return path


def read_step(path: str | Path, shard: str) -> Any:
    """Return the state of a shard; no byte of it is used before its checksum was compared.

    Args:
        path: the step's folder.
        shard: name.

    Raises:
        DamagedFileError: if the manifest or the shard's file is not what was written.
        InputError: if the step has no such shard.
    """
    path = Path(path)
    manifest = read_manifest(path)
    places = manifest["shards"].get(shard)
    if places is None:
        raise InputError(f"{path} has no shard {shard!r}; it has {', '.join(manifest['shards'])}")
    with CheckedFile(path, places["file"], manifest) as file:
        skeleton = _load(file.read(*places["skeleton"]))
        tensors = [_load(file.read(*place)) for place in places["tensors"]]
    return unpack(skeleton.numpy().tobytes(), tensors)


def _load(record: bytes) -> Tensor:
    return torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)


def check_values(step: int, shards: Mapping[str, Any]) -> None:
    """Refuse what cannot be the number of a step, or names of shards; see ``write_step``.

    Raises:
        InputError: for such values.
    """
    if not 0 <= step < 10**18:
        raise InputError(f"step must be 0 or more, got {step}")
    wrong = [name for name in shards if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name)]
    if wrong or not shards:
        raise InputError(f"shards need names of letters, digits, _ and -, got {wrong or 'none at all'}; rank0 is one")


def new_manifest(step: int, meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the manifest of a step without files."""
    described = {"format": FORMAT_VERSION, "step": step, "written_at": time.time(), "meta": dict(meta or {})}
    return {**described, "shards": {}, "files": {}}


def write_shards(folder: Path, shards: Mapping[str, Any], keys: KeyTable, manifest: dict[str, Any]) -> None:
    """Write a file a shard, and note them in the table of keys and in the manifest."""
    for name, state in shards.items():
        manifest["shards"][name] = _write_shard(folder, name, state, keys, manifest["files"])


def write_ends(folder: Path, keys: KeyTable, manifest: dict[str, Any]) -> None:
    """Write what makes the folder of shards a step: torch's metadata, and the manifest as the last of all files."""
    with ChecksummedFile(folder / METADATA) as file:
        file.write(keys.metadata())
    manifest["files"][METADATA] = file.entry()
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest.

    Raises:
        InputError: if it holds what JSON does not.
    """
    try:
        encoded = encode_manifest(manifest)
    except (TypeError, ValueError) as error:
        raise InputError(f"meta takes numbers, strings, None, lists and dicts of them: {error}") from error
    with ChecksummedFile(folder / MANIFEST) as file:
        file.write(encoded)


def _write_shard(folder: Path, name: str, state: Any, keys: KeyTable, files: dict[str, Any]) -> dict[str, Any]:
    packed = pack(state)
    file_name = f"{name}.distcp"
    with ChecksummedFile(folder / file_name) as file:
        records = [_write_tensor(file, file_name, tensor) for tensor in packed.tensors]
        skeleton_tensor = torch.frombuffer(bytearray(packed.skeleton), dtype=torch.uint8)
        skeleton = _write_tensor(file, file_name, skeleton_tensor)
        keys.add_tensor(("skeletons", name), skeleton_tensor, skeleton)
        prefix = () if name == "shared" else (name,)
        keys.add_state(prefix, state, packed.tensors, records, lambda value: _write_object(file, file_name, value))
    files[file_name] = file.entry()
    return {"file": file_name, "skeleton": skeleton[1:], "tensors": [record[1:] for record in records]}


def _write_tensor(file: ChecksummedFile, file_name: str, tensor: Tensor) -> Record:
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()  # a view would be saved with all of its storage
    return _write_object(file, file_name, tensor)


def _write_object(file: ChecksummedFile, file_name: str, value: Any) -> Record:
    start = file.bytes
    torch.save(value, cast(IO[bytes], file))
    return Record(file_name, start, file.bytes - start)
