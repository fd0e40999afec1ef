"""Ok-Topk: gradients travel as their largest entries, summed for at most 6 k words from and to each rank.

Everything works over ``torch.distributed`` with any number of ranks, on gloo and on NCCL, inside and outside of a Trainer.
"""

from lightning_plugins.engines.sparse_allreduce.allreduce import sparse_allreduce as sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.state import SparseAllreduceState as SparseAllreduceState

__all__ = ["SparseAllreduceState", "sparse_allreduce"]
