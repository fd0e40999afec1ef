"""Optional packages: imported where they are used, and refused with the extra that brings them."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from lightning_plugins._support.errors import PackageError

# Package as imported -> extra of ours that installs it.
EXTRAS = {
    "torchvision": "vision", "timm": "vision", "cv2": "vision",
    "PIL": "report", "defusedxml": "report", "matplotlib": "report", "jinja2": "report",
    "wandb": "wandb",
    "jsonargparse": "cli", "yaml": "cli", "rich": "cli", "click": "cli",
    "deepspeed": "deepspeed",
}  # fmt: skip


def is_installed(package: str) -> bool:
    """Tell whether ``package`` can be found, without importing it."""
    return find_spec(package) is not None


def require(module: str) -> ModuleType:
    """Import an optional module.

    Raises:
        PackageError: (an ImportError) if its package is not installed, naming the extra to install.
    """
    package = module.partition(".")[0]
    if not is_installed(package):
        extra = EXTRAS[package]
        raise PackageError(f"{package} is needed here and not installed; install it with the extra: pip install -e '.[{extra}]'")
    return import_module(module)
