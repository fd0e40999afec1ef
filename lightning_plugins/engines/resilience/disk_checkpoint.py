"""A step on disk as the one checkpoint that Lightning knows: what all replicas share, and what is one rank's own."""

from itertools import chain
from pathlib import Path
from typing import Any

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.disk import read_step
from lightning_plugins.engines.resilience.disk_steps import MANIFEST, read_manifest, step_folder, steps
from lightning_plugins.engines.resilience.shards import SHARED, join, own_shard
from lightning_plugins.engines.resilience.tensor_pieces import PIECES, assemble

_EXACT = ("exact_resume", "rank_state", "gradient_order")


def is_step(path: str | Path) -> bool:
    """Say whether a path is a folder of a step, whole or not, or a folder of steps."""
    path = Path(path)
    return path.is_dir() and (path.name.startswith("step-") or (path / MANIFEST).exists() or bool(steps(path, thorough=False)))


def read_checkpoint(path: str | Path, rank: int = 0) -> dict[str, Any]:
    """Return the ordinary checkpoint that a step holds, all tensors whole; what only exact resuming needs is left out.

    Args:
        path: the step's folder.
        rank: whose buffers, schedulers, callbacks and data loaders it continues; rank 0's where the step has fewer ranks.

    Raises:
        DamagedFileError: if the step is not what was written.
        InputError: if the folder is one of several steps, or of a step that holds no replicas.
    """
    path = Path(path)
    if not (path / MANIFEST).exists() and (found := [one for one in steps(path, thorough=False) if not one.damage]):
        raise InputError(f"{path} holds {len(found)} steps; give one of them, {step_folder(path, found[0].step)} is the newest")
    shards = read_manifest(path)["shards"]
    own_name = own_shard(rank) if own_shard(rank) in shards else own_shard(0)
    if SHARED not in shards or own_name not in shards:
        raise InputError(f"{path} has the shards {', '.join(shards)}, not those of replicas; read them with read_step")
    checkpoint = join(read_step(path, SHARED), read_step(path, own_name))
    if PIECES in checkpoint:
        others = (read_step(path, name) for name in shards if name not in (SHARED, own_name))
        checkpoint = assemble(chain([checkpoint], others))
    return {name: value for name, value in checkpoint.items() if name not in _EXACT}
