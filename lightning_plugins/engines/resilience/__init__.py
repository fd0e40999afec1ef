"""Runs that survive: captures in the memory of a keeper process, peers, disk, and the way back.

Names resolve on first use: the keeper's process, which imports its parts through this package, must not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_plugins.engines.resilience.keeper_client import KeeperClient as KeeperClient
    from lightning_plugins.engines.resilience.placement import place_copies as place_copies
    from lightning_plugins.engines.resilience.state_tree import check_loads as check_loads
    from lightning_plugins.engines.resilience.state_tree import pack as pack
    from lightning_plugins.engines.resilience.state_tree import unpack as unpack

_MODULES = {
    "KeeperClient": "keeper_client",
    "check_loads": "state_tree",
    "pack": "state_tree",
    "place_copies": "placement",
    "unpack": "state_tree",
}
__all__ = ["KeeperClient", "check_loads", "pack", "place_copies", "unpack"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"{__name__} has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
