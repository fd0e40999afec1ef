"""What one process does for all: the others wait until it is done, however long it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# A process group gives up on a silent member after 30 minutes; a folder of photographs may take longer.
PATIENCE = timedelta(days=30)


@contextmanager
def waiting_for_first(is_first: bool) -> Iterator[bool]:
    """Yield ``is_first``, and let the other processes wait at the end of the block for the first.

    Without a process group (one process, or none that trained) nobody waits. If the first process raises, the others are let go.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield is_first
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield is_first
    finally:
        dist.barrier(group)
