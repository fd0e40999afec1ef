"""Ways to reduce gradients that are compared: strategies of Lightning, and what each has sent."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins import OkTopkStrategy
from lightning_plugins._lightning import DDPStrategy
from lightning_plugins._support.errors import InputError, nearest

# Names in pictures.
CONTESTANTS = {
    "dense": "dense",
    "ok_topk": "Ok-Topk",
    "ok_topk_bfloat16": "Ok-Topk, bfloat16",
    "powersgd": "PowerSGD",
}
SPARSE = ("ok_topk", "ok_topk_bfloat16")

# The hook's futures run on gloo's own threads, where two buckets may start their collectives in another order on each rank.
_ONE_BUCKET_MB = 1 << 20


class PowerSGDStrategy(DDPStrategy):
    """DDP with torch's PowerSGD hook, which Lightning itself would register on CUDA alone; it counts what is sent.

    Args:
        rank: of the factors.

    Attributes:
        sent_bytes: so far.
    """

    def __init__(self, rank: int = 2) -> None:
        super().__init__(bucket_cap_mb=_ONE_BUCKET_MB)
        self.sent_bytes = 0
        # Not before the third step: until then DDP may still change its buckets, by whose numbers the hook keeps its state.
        self.powersgd = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self, _counted_powersgd)


def _counted_powersgd(strategy: PowerSGDStrategy, bucket: dist.GradBucket) -> Future[Tensor]:
    state, buffer = strategy.powersgd, bucket.buffer()
    dense = state.iter < state.start_powerSGD_iter
    sent_before = state.compression_stats()[2]
    future = powerSGD_hook(state, bucket)
    # The hook counts both factors of each matrix, and what it leaves as it is.
    elements = buffer.numel() if dense else state.compression_stats()[2] - sent_before
    strategy.sent_bytes += all_reduce_bytes(elements * buffer.element_size(), strategy.world_size)
    return future


def make_strategy(name: str, density: float) -> DDPStrategy:
    """Return the strategy of a contestant.

    Args:
        name: in ``CONTESTANTS``.
        density: of Ok-Topk.

    Raises:
        InputError: for an unknown contestant, or a density out of range.
    """
    if name not in CONTESTANTS:
        raise InputError(f"there is no contestant {name!r}; {nearest(name, CONTESTANTS)}")
    if name in SPARSE:
        # Its bytes are counted since the last log, so nothing is logged.
        return OkTopkStrategy(density, values="bfloat16" if name == "ok_topk_bfloat16" else "exact", log_every=0)
    return PowerSGDStrategy() if name == "powersgd" else DDPStrategy()


def sent_bytes(strategy: DDPStrategy, steps: int) -> int:
    """Return what this process has sent in so many optimizer steps."""
    if isinstance(strategy, OkTopkStrategy):
        assert strategy.ok_topk is not None
        return strategy.ok_topk.traffic.total_bytes()[0]
    if isinstance(strategy, PowerSGDStrategy):
        return strategy.sent_bytes
    assert strategy.model is not None
    gradient_bytes = sum(parameter.nbytes for parameter in strategy.model.parameters() if parameter.requires_grad)
    return steps * all_reduce_bytes(gradient_bytes, strategy.world_size)


def all_reduce_bytes(size_bytes: int, ranks: int) -> int:
    """Return what a rank sends at least in an all-reduce of so many bytes: 2 b (P - 1) / P."""
    return 2 * size_bytes * (ranks - 1) // ranks
