"""Where the engine leans on what torch does not promise; ``test_seams.py`` names what an upgrade changed."""

from datetime import timedelta

import torch
import torch.distributed as dist


def timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> timedelta | None:
    """Return how long a group waits for a silent rank, or None where torch does not tell: groups made of it wait as long."""
    if group is None and dist.group.WORLD is None:
        return None
    options = getattr(_backend(group, device), "options", None)
    return getattr(options, "_timeout", None)


def wire_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Return where tensors of a device have to be for a group to send them: gloo has no all-to-all of CUDA tensors.

    A group may have a backend for each device, and then a name that tells nothing (``undefined``, ``cpu:gloo,cuda:nccl``).
    """
    return device if _backend(group, device).name() == "nccl" else torch.device("cpu")


def _backend(group: dist.ProcessGroup | None, device: torch.device) -> dist._Backend:
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return group._get_backend(device)
