"""Where the engine leans on what torch does not promise; ``test_seams.py`` names what an upgrade changed."""

from datetime import timedelta

import torch
import torch.distributed as dist


def timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> timedelta | None:
    """Return how long a group waits for a silent rank, or None where torch does not tell: groups made of it wait as long."""
    group = dist.group.WORLD if group is None else group
    options = getattr(group._get_backend(device), "options", None) if group is not None else None
    return getattr(options, "_timeout", None)
