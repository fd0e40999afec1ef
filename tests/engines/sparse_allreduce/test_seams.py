"""Canary of ``_seams.py``: what torch does not promise, and the engine leans on."""

from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_plugins.engines.sparse_allreduce._seams import timeout_of


def timeouts(rank, world_size):
    made = dist.new_group(timeout=timedelta(seconds=7))
    cpu = torch.device("cpu")
    return timeout_of(None, cpu), timeout_of(made, cpu)


def test_a_groups_timeout_can_be_read(ranks):
    """If torch has moved it, groups made of a group wait for the default half hour instead, and a dead rank is noticed late."""
    assert ranks.run(timeouts, 2, timeout_s=19) == [(timedelta(seconds=19), timedelta(seconds=7))] * 2
