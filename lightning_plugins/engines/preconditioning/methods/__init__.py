"""The methods, one file each, and their table."""

from lightning_plugins.engines.preconditioning.blocks import MethodEntry
from lightning_plugins.engines.preconditioning.methods import foof, kfac, muon, psgd, shampoo, soap, unit

METHODS: dict[str, MethodEntry] = {
    "kfac": kfac.ENTRY,
    "foof": foof.ENTRY,
    "unit": unit.ENTRY,
    "psgd": psgd.ENTRY,
    "shampoo": shampoo.ENTRY,
    "soap": soap.ENTRY,
    "muon": muon.ENTRY,
}
