"""Reading and writing ``.grad``, whole or in shards.

Under FSDP2 a parameter and its gradient are DTensors, each rank with some of the rows. Reading gathers them; writing keeps this
rank's.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def read_gradient(parameter: nn.Parameter) -> Tensor:
    """Return the whole gradient of a parameter, which must have one."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def write_gradient(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a whole tensor into ``.grad``, which others hold references to (DDP's buckets, fused optimizers); never rebind it."""
    gradient = parameter.grad
    assert gradient is not None
    if not isinstance(gradient, DTensor):
        gradient.copy_(value.view_as(gradient) if value.is_contiguous() else value.reshape(gradient.shape))
        return
    local, value = gradient.to_local(), value.reshape(gradient.shape)
    for axis, placement in enumerate(gradient.placements):
        if isinstance(placement, Shard):
            pieces = torch.chunk(value, gradient.device_mesh.size(axis), dim=placement.dim)
            rank = gradient.device_mesh.get_local_rank(axis)
            value = pieces[rank] if rank < len(pieces) else value.narrow(placement.dim, 0, 0)
    local.copy_(value)
