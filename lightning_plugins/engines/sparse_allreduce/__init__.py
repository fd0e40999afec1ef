"""Ok-Topk: gradients travel as their largest entries, summed for at most 6 k words from and to each rank.

Everything works over ``torch.distributed`` with any number of ranks, on gloo and on NCCL, inside and outside of a Trainer.
"""

from lightning_plugins.engines.sparse_allreduce.allreduce import sparse_allreduce as sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.hook import OkTopkState as OkTopkState
from lightning_plugins.engines.sparse_allreduce.hook import ok_topk_hook as ok_topk_hook
from lightning_plugins.engines.sparse_allreduce.rank_state import merge_rank_states as merge_rank_states
from lightning_plugins.engines.sparse_allreduce.sharded import ShardedOkTopk as ShardedOkTopk
from lightning_plugins.engines.sparse_allreduce.state import SparseAllreduceState as SparseAllreduceState

__all__ = ["OkTopkState", "ShardedOkTopk", "SparseAllreduceState", "merge_rank_states", "ok_topk_hook", "sparse_allreduce"]
