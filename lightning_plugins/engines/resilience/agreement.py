"""Which step the ranks go on from: the newest that each of them can obtain."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

MOST_STEPS = 8  # that a rank names, newest first


def common_steps(steps: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """Return the steps that every rank has named, newest first.

    Args:
        steps: what this rank can obtain; the newest eight are looked at.
        group: the ranks; None is the default group, or this process alone where there is none.
    """
    own = sorted(set(steps), reverse=True)[:MOST_STEPS]
    if not _several(group):
        return own
    row = torch.tensor([*own, *[-1] * (MOST_STEPS - len(own))], dtype=torch.int64)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    device = _device(group)
    moved = [one.to(device) for one in rows]
    dist.all_gather(moved, row.to(device), group=group)
    return [step for step in own if all(step in one.tolist() for one in moved)]


def everywhere(condition: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether a condition holds on all ranks."""
    if not _several(group):
        return condition
    failures = torch.tensor([int(not condition)], device=_device(group))
    dist.all_reduce(failures, group=group)
    return int(failures) == 0


def first_reason(reason: str, group: dist.ProcessGroup | None = None) -> str:
    """Return what the first rank that has a reason says, on all ranks; empty if none has."""
    if not _several(group):
        return reason
    reasons: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    return next(filter(None, reasons), "")


def _several(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _device(group: dist.ProcessGroup | None) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
