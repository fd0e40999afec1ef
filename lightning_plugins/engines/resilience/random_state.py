"""The state of every random generator of a process: Python's, numpy's, torch's, and those of its accelerators.

Plain values and tensors only, so that what was taken can be read back with a safe loader.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def take_random_state() -> dict[str, Any]:
    """Return the state of all generators of this process."""
    version, internal, gauss = random.getstate()
    algorithm, key, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - users draw from it
    state: dict[str, Any] = {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [algorithm, torch.from_numpy(np.asarray(key).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        module = torch.get_device_module()
        state["accelerator"] = [module.get_rng_state(index) for index in range(module.device_count())]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put all generators back to a state that ``take_random_state`` returned.

    Accelerators that are not here are left out: a state of two GPUs can be put back on one.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    algorithm, key, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, key.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.accelerator.is_available():
        module = torch.get_device_module()
        for index, of_device in enumerate(state.get("accelerator", [])[: module.device_count()]):
            module.set_rng_state(of_device, index)
