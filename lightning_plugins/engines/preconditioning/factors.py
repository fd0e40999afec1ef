"""Second moments of rows, and their running averages.

Sums and counts are kept apart until a step ends: micro-batches, several calls of one module and ranks add to both, and the
quotient is the mean over all of them, whatever their sizes.
"""

import itertools

import torch
from torch import Tensor

# Patches are made for so many bytes at a time: unfolding a whole batch takes kernel-size times the memory of its input.
CHUNK_BYTES = 64 * 2**20
# Below this width a product is too short to be worth cutting; more strips than four save little and are slow themselves.
_NARROW = 256
_STRIPS = 4


def strips(width: int, on_gpu: bool) -> list[tuple[int, int]]:
    """Return the rows of each strip in which one triangle of a symmetric or triangular product is made, 5/8 of the work.

    A GPU prefers one large product, and narrow ones stay whole.
    """
    count = 1 if on_gpu or width < _NARROW else _STRIPS
    return list(itertools.pairwise(width * strip // count for strip in range(count + 1)))


def second_moment(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sum_r rows_r rows_r^T`` for rows ``(..., rows, F)`` as ``(..., F, F)``."""
    rows = rows.to(dtype)
    width = rows.shape[-1]
    cuts = strips(width, rows.is_cuda)
    if len(cuts) == 1:
        return torch.matmul(rows.mT, rows)
    moment = rows.new_empty(*rows.shape[:-2], width, width)
    for start, stop in cuts:
        strip = torch.matmul(rows[..., start:stop].mT, rows[..., :stop])
        moment[..., start:stop, :stop] = strip
        moment[..., :start, start:stop] = strip[..., :start].mT
    return moment


class RunningMean:
    """An exponential moving average with bias correction: the first value counts in full, the k-th at least ``1/k``.

    Args:
        decay: weight of the past once it is long, in [0, 1); the k-th value replaces ``1 - min(1 - 1/k, decay)`` of it.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.value: Tensor | None = None

    def add(self, new: Tensor) -> None:
        """Take in one value, which this object may keep and change."""
        self.steps += 1
        if self.value is None:
            self.value = new
        else:
            self.value.lerp_(new, 1.0 - min(1.0 - 1.0 / self.steps, self.decay))

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"steps": self.steps} if self.value is None else {"steps": self.steps, "value": self.value}

    def load_state_dict(self, state: dict[str, Tensor | int], device: torch.device) -> None:
        self.steps = int(state["steps"])
        value = state.get("value")
        self.value = value.to(device, copy=True) if isinstance(value, Tensor) else None
