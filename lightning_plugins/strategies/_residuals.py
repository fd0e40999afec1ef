"""What the strategies of Trainer and Fabric share around the state of Ok-Topk."""

import inspect
import pickle
import warnings
from typing import Any

import fsspec
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.sparse_allreduce import OkTopkState, merge_rank_states
from lightning_plugins.engines.sparse_allreduce.hook_options import HookOptions
from lightning_plugins.engines.sparse_allreduce.settings import Settings
from lightning_plugins.strategies import _rank_files as files

MISSING = "there are no files"


def check_log_every(log_every: Any) -> None:
    """Refuse what is no interval, by the name that the user has given."""
    if not isinstance(log_every, int) or log_every < 0:
        raise InputError(f"log_every must be a whole number of steps, got {log_every}; 0 logs nothing")


def shown(options: HookOptions, settings: Settings) -> str:
    """Return all settings by the names of the strategies' arguments."""
    names = {"measure_every": "log_every", "unused_parameters": "find_unused_parameters"}
    values = {**vars(options), **vars(settings)}
    return ", ".join(f"{names.get(name, name)}={value!r}" for name, value in values.items())


def check_ddp_options(ddp: dict[str, Any], strategy: type) -> None:
    """Refuse a second communication hook, and what neither the strategy below nor DDP knows.

    Args:
        ddp: options that are not ours.
        strategy: Lightning's, that gets them.
    """
    for name in ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period"):
        if ddp.get(name) is not None:
            raise InputError(f"{name} cannot act beside Ok-Topk, which is the communication hook itself; leave it out")
    known = {*inspect.signature(strategy).parameters, *inspect.signature(DistributedDataParallel).parameters}
    known |= {*Settings.__dataclass_fields__, *HookOptions.__dataclass_fields__, "log_every"}
    known -= {"kwargs", "module"}
    for name in ddp:
        if name not in known:
            raise InputError(f"there is no option {name!r}; {nearest(name, known)}")


def restore(state: OkTopkState, checkpoint: str, described: dict[str, Any]) -> None:
    """Read what a rank needs of a checkpoint's files; every rank calls this.

    Args:
        state: that takes it.
        checkpoint: path.
        described: what the checkpoint says of its files.

    Raises:
        InputError: on every rank, if one has a file that cannot be read, or of another model, or sees no files where others do.
    """
    said, found = "", None
    try:
        found = files.find(checkpoint, described["token"], described["ranks"])
        if found is not None:
            _restore(state, checkpoint, described["ranks"], found)
    except InputError as error:
        said = str(error)
    folder = files.folder_of(checkpoint)
    answers = state.everyone.all_gather_text(said or (MISSING if found is None else ""))
    for rank, of_rank in enumerate(answers):
        if of_rank not in ("", MISSING):
            raise InputError(said or f"rank {rank}: {of_rank}")
    without = [rank for rank, of_rank in enumerate(answers) if of_rank == MISSING]
    if 0 < len(without) < len(answers):
        raise InputError(
            f"ranks {without} do not see the residuals in {folder}, others do; put checkpoint and folder where all ranks can read"
        )
    if without:
        warnings.warn(
            f"{checkpoint} was saved with residuals in {folder}, and they are not there: what had not been sent yet is lost; "
            "copy that folder beside the checkpoint to go on exactly",
            stacklevel=2,
        )


def _restore(state: OkTopkState, checkpoint: str, saved_ranks: int, found: list[str]) -> None:
    ranks = state.nodes.ranks
    if saved_ranks == ranks:
        state.load_rank_state_dict(_load(found[state.nodes.rank]))
        return
    inside = state.nodes.inside
    if saved_ranks % inside:
        raise InputError(
            f"the residuals of {checkpoint} are of {saved_ranks} ranks, which are no whole nodes of {inside}; resume with the "
            "ranks_per_node that it was saved with"
        )
    states = [_load(file) for file in found[state.nodes.place :: inside]]
    state.load_rank_state_dict(merge_rank_states(states, state.exchange.rank, state.exchange.ranks))
    rank_zero_info(f"residuals of {saved_ranks} ranks were merged for {ranks}; thresholds and cuts are found anew")


def _load(file: str) -> dict[str, Any]:
    """Read a rank's file: tensors and plain values, nothing that runs."""
    try:
        with fsspec.open(file, "rb") as opened:
            state: dict[str, Any] = torch.load(opened, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{file} cannot be read as residuals; resume from another checkpoint") from error
    return state


class StepLog:
    """Which steps are logged, and since which pass bytes and seconds are counted.

    Args:
        every: steps between two logs; 0 for none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._passes = 0
        self._advised = ""

    def values(self, state: OkTopkState) -> dict[str, float]:
        """Return what is to be logged after this step, by key; most steps nothing."""
        if state.advice is not None and state.advice.sentence != self._advised:
            self._advised = state.advice.sentence
            rank_zero_info(self._advised)
        passes = state.passes - self._passes  # none where a second optimizer steps after the same pass
        if not self._every or state.attempts % self._every or not passes:
            return {}
        traffic = state.traffic
        sent_bytes, received_bytes = traffic.total_bytes()
        # What a measurement costs is not the method's.
        sent_bytes -= traffic.sent_bytes["assumption"]
        received_bytes -= traffic.received_bytes["assumption"]
        values = {
            **state.metrics,
            "sent_mb": 1e-6 * sent_bytes / passes,
            "received_mb": 1e-6 * received_bytes / passes,
            **{f"{phase}_ms": 1e3 * seconds / passes for phase, seconds in traffic.seconds.items()},
        }
        traffic.clear()
        self._passes = state.passes
        return {f"{files.KEY}/{name}": value for name, value in values.items()}
