"""The one place that names Lightning, and chooses between its two class trees.

``pytorch_lightning`` and ``lightning.pytorch`` do not share classes. The choice is made once, when the first adapter is
resolved, by the rule of ``_support/namespace.py``: the variable LIGHTNING_PLUGINS_NAMESPACE, else what is loaded, else
``pytorch_lightning``.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from lightning_plugins._support.namespace import VARIABLE, choose_namespace, installed_versions, refuse_malicious

refuse_malicious(installed_versions())
NAMESPACE = choose_namespace(os.environ, list(sys.modules))


def submodule(name: str) -> ModuleType:
    """Import ``name`` (such as ``"cli"``) of the chosen Lightning."""
    return import_module(f"{NAMESPACE}.{name}")


def built_for() -> str:
    """Return the clause that the repr of modules and strategies carries, for a Trainer of the other tree to print."""
    return f"built for {NAMESPACE}; set {VARIABLE} to change it"


if TYPE_CHECKING:
    from lightning_fabric.strategies.ddp import DDPStrategy as _FabricDDPStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException as MisconfigurationException
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning import LightningDataModule as LightningDataModule
    from pytorch_lightning import LightningModule as LightningModule
    from pytorch_lightning import Trainer as Trainer
    from pytorch_lightning import seed_everything as seed_everything
    from pytorch_lightning.callbacks import ModelCheckpoint as ModelCheckpoint
    from pytorch_lightning.cli import LightningCLI as LightningCLI
    from pytorch_lightning.cli import SaveConfigCallback as SaveConfigCallback
    from pytorch_lightning.loggers import CSVLogger as CSVLogger
    from pytorch_lightning.loggers import Logger as Logger
    from pytorch_lightning.loggers import WandbLogger as WandbLogger
    from pytorch_lightning.plugins.io import TorchCheckpointIO as TorchCheckpointIO
    from pytorch_lightning.strategies import DDPStrategy as DDPStrategy

    FabricDDPStrategy = _FabricDDPStrategy
    LIGHTNING_VERSION: str
else:
    _root = import_module(NAMESPACE)
    Callback = _root.Callback
    LightningDataModule = _root.LightningDataModule
    LightningModule = _root.LightningModule
    LIGHTNING_VERSION = _root.__version__
    Trainer = _root.Trainer
    seed_everything = _root.seed_everything
    ModelCheckpoint = submodule("callbacks").ModelCheckpoint
    CSVLogger = submodule("loggers").CSVLogger
    Logger = submodule("loggers").Logger
    WandbLogger = submodule("loggers").WandbLogger
    TorchCheckpointIO = submodule("plugins.io").TorchCheckpointIO
    DDPStrategy = submodule("strategies").DDPStrategy

    def __getattr__(name: str) -> object:
        # jsonargparse is an extra, and slow to import for those who only want an adapter; few want the others.
        if name in ("LightningCLI", "SaveConfigCallback"):
            return getattr(submodule("cli"), name)
        if name == "MisconfigurationException":
            return submodule("utilities.exceptions").MisconfigurationException
        if name == "FabricDDPStrategy":
            fabric = "lightning_fabric" if NAMESPACE == "pytorch_lightning" else "lightning.fabric"
            return import_module(f"{fabric}.strategies").DDPStrategy
        raise AttributeError(f"lightning_plugins._lightning has no {name!r}")
