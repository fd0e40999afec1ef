"""The methods, one file each, and their table."""

from lightning_plugins.engines.preconditioning.blocks import MethodEntry
from lightning_plugins.engines.preconditioning.methods import foof, kfac

METHODS: dict[str, MethodEntry] = {
    "kfac": kfac.ENTRY,
    "foof": foof.ENTRY,
}
