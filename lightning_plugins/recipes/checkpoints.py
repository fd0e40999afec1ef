"""The checkpoint a killed run goes on from: the newest one in its folder that can be read."""

import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step under ``folder``, the younger file of two equals, or None if there is none.

    A file that cannot be read (cut off by a full disk, say) is passed over with a warning, and another warning says which one is
    taken instead. Tensors are mapped, not loaded, so the cost is one small read a file.

    Args:
        folder: a run folder.
    """
    paths = list(folder.rglob("*.ckpt"))
    found = [(step, path.stat().st_mtime_ns, path) for path in paths if (step := _step(path)) is not None]
    if not found:
        return None
    step, _, newest = max(found)
    if len(found) < len(paths):
        warnings.warn(f"the run goes on from {newest}, at step {step}", stacklevel=2)
    return newest


def _step(path: Path) -> int | None:
    try:
        return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])
    except UnpicklingError:
        # Whole, but with classes of the user's own inside, which the safe loader refuses: Lightning may still load it.
        return 0
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"{path} is no readable checkpoint ({str(error).splitlines()[0]}) and is passed over", stacklevel=3)
        return None
