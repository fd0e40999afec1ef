"""Reading and writing the models' checkpoints: safe loading, and one sentence for each way in which a file can be wrong."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError

# Where the weights started from is no property of the trained model.
TRAINING_OPTIONS = ("teacher", "pretrained")
ModuleType = TypeVar("ModuleType", bound=nn.Module)


def load_module(module_class: type[ModuleType], path: str | Path) -> ModuleType:
    """Return a module from a checkpoint of Lightning or of ``deploy``, on the CPU, in evaluation mode.

    Raises:
        InputError: if the file is missing, truncated, no checkpoint, or of another architecture.
    """
    name = module_class.__name__
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} does not exist; give a file that {name} wrote")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise InputError(f"checkpoint {path} is truncated or no checkpoint; copy it again, or give another file") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= set(checkpoint):
        raise InputError(f"checkpoint {path} holds no state_dict with hyper_parameters; give a file that {name} wrote")
    try:
        module = module_class(**model_options(checkpoint["hyper_parameters"]))
    except TypeError as error:
        raise InputError(
            f"checkpoint {path} is of another model than {name} (its options do not fit); give a file that {name} wrote"
        ) from error
    weights = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("adapters.")}
    expected = module.state_dict()
    wrong = [
        key
        for key in expected.keys() | weights.keys()
        if key not in weights or key not in expected or weights[key].shape != expected[key].shape
    ]
    if wrong:
        raise InputError(
            f"checkpoint {path} is of another architecture: {len(wrong)} of {len(expected)} tensors differ, {min(wrong)} first; "
            f"give a file that {name} wrote with this version"
        )
    module.load_state_dict(weights)
    return module.eval()


def model_options(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor's options that make the model, without its training's and what LightningCLI adds for itself."""
    return {key: value for key, value in hyper_parameters.items() if key not in TRAINING_OPTIONS and not key.startswith("_")}


def save_deployed(
    state: Mapping[str, Tensor], hyper_parameters: Mapping[str, Any], lightning_version: str, path: str | Path
) -> None:
    """Write a checkpoint in Lightning's format; whole or not at all.

    Args:
        state: tensors by name.
        hyper_parameters: the constructor's options; those of the training are left out.
        lightning_version: what wrote it, for Lightning's own migration of old files.
        path: the file.
    """
    content = {
        "state_dict": {key: value.detach().cpu() for key, value in state.items()},
        "hyper_parameters": model_options(hyper_parameters),
        "pytorch-lightning_version": lightning_version,
    }
    with atomic_write(path) as file:
        torch.save(content, file)
