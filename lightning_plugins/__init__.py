"""Ten papers' training systems for PyTorch Lightning.

Names resolve on first use: importing this package imports neither torch nor Lightning.
"""

from importlib import import_module
from typing import Any

from lightning_plugins._support.methods import METHODS

__version__ = "0.1.0"
__all__ = sorted(METHODS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in METHODS:
        raise AttributeError(f"lightning_plugins has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(METHODS[name].module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
