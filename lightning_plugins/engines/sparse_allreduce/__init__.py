"""Ok-Topk: gradients travel as their largest entries, k of them, summed for at most 6 k words of entries from and to each rank.

Everything works over ``torch.distributed`` with any number of ranks, on gloo and on NCCL, inside and outside of a Trainer.
"""

from lightning_plugins.engines.sparse_allreduce.allreduce import sparse_allreduce as sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.hook import OkTopkState as OkTopkState
from lightning_plugins.engines.sparse_allreduce.hook import ok_topk_hook as ok_topk_hook
from lightning_plugins.engines.sparse_allreduce.rank_state import merge_rank_states as merge_rank_states
from lightning_plugins.engines.sparse_allreduce.rivals import ALGORITHMS as ALGORITHMS
from lightning_plugins.engines.sparse_allreduce.rivals import dense_allreduce as dense_allreduce
from lightning_plugins.engines.sparse_allreduce.rivals import gaussian_k_allgather as gaussian_k_allgather
from lightning_plugins.engines.sparse_allreduce.rivals import gtopk_allreduce as gtopk_allreduce
from lightning_plugins.engines.sparse_allreduce.rivals import topk_allgather as topk_allgather
from lightning_plugins.engines.sparse_allreduce.rivals import topk_dsa as topk_dsa
from lightning_plugins.engines.sparse_allreduce.sharded import ShardedOkTopk as ShardedOkTopk
from lightning_plugins.engines.sparse_allreduce.state import SparseAllreduceState as SparseAllreduceState

__all__ = [
    "ALGORITHMS",
    "OkTopkState",
    "ShardedOkTopk",
    "SparseAllreduceState",
    "dense_allreduce",
    "gaussian_k_allgather",
    "gtopk_allreduce",
    "merge_rank_states",
    "ok_topk_hook",
    "sparse_allreduce",
    "topk_allgather",
    "topk_dsa",
]
