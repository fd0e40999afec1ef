"""The private touches of ``ModelParallelStrategy``: each rank captures its own pieces, and puts them back by itself.

That strategy gathers or moves to the CPU all that a checkpoint has, and restores from files alone, after it has been set up. Here
modules and optimizers are asked directly: their tensors are where they are, and nothing travels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lightning_plugins._lightning import Trainer
from lightning_plugins.callbacks.memory_checkpoint._seams import OpenedLoop
from lightning_plugins.engines.resilience.tensor_pieces import Path, pieces, take_apart


def is_sharded(trainer: Trainer) -> bool:
    """Say whether ranks hold pieces of the model, and restore after the strategy has set it up."""
    return type(trainer.strategy).__name__ == "ModelParallelStrategy"


def layout(trainer: Trainer) -> str:
    """Return how ranks are laid out: pieces fit no other layout."""
    mesh = trainer.strategy.device_mesh  # type: ignore[attr-defined]
    return ", ".join(f"{name}={size}" for name, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True))


def take_pieces(loop: OpenedLoop) -> dict[str, Any]:
    """Return what ``loop.take`` returns, with this rank's pieces of parameters and optimizer states."""
    strategy = loop.trainer.strategy
    module = loop.trainer.lightning_module
    ways: dict[str, Any] = {
        "lightning_module_state_dict": lambda: module.state_dict(),
        "optimizer_state": lambda optimizer: optimizer.state_dict(),
    }
    vars(strategy).update(ways)
    try:
        return take_apart(loop.take())
    finally:
        for name in ways:
            vars(strategy).pop(name)


def restore_pieces(trainer: Trainer, state: Mapping[str, Any], give_up: Callable[[], None]) -> None:
    """Have pieces put back when Lightning restores the model, after the module's hooks; until then ``ckpt_path`` is not known.

    Args:
        trainer: whose strategy has set the model up, in the same layout.
        state: that ``OpenedLoop.resume`` was given.
        give_up: called instead if it is another checkpoint that Lightning restores.
    """
    strategy = trainer.strategy
    load = strategy.load_model_state_dict

    def restore(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        vars(strategy).pop("load_model_state_dict", None)
        if checkpoint is state:
            _put_back(trainer, checkpoint, strict)
        else:
            give_up()
            load(checkpoint, strict=strict)

    vars(strategy)["load_model_state_dict"] = restore


def _put_back(trainer: Trainer, state: Mapping[str, Any], strict: bool) -> None:
    shapes = {path: shape for path, _, shape, _ in pieces(state)}

    def rebuilt(value: Any, path: Path, like: Any) -> Any:
        if isinstance(value, dict):
            return {key: rebuilt(item, (*path, str(key)), like) for key, item in value.items()}
        if isinstance(value, list):
            return [rebuilt(item, (*path, number), like) for number, item in enumerate(value)]
        if path not in shapes or not isinstance(like, DTensor):
            return value
        stride = torch.empty(shapes[path], device="meta").stride()
        local = value.to(like.device)
        return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shapes[path], stride=stride)

    module = trainer.lightning_module
    own = module.state_dict()
    weights = {name: rebuilt(value, ("state_dict", name), own.get(name)) for name, value in state["state_dict"].items()}
    module.load_state_dict(weights, strict=strict)
    for number, (optimizer, saved) in enumerate(zip(trainer.optimizers, state["optimizer_states"], strict=True)):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {
            index: rebuilt(of_parameter, ("optimizer_states", number, "state", str(index)), parameters[index])
            for index, of_parameter in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": states})
