"""The methods, one file each, and their table."""

from lightning_plugins.engines.preconditioning.blocks import MethodEntry
from lightning_plugins.engines.preconditioning.methods import (
    diag,
    ekfac,
    foof,
    full,
    kbfgs,
    kfac,
    layer,
    muon,
    psgd,
    seng,
    shampoo,
    soap,
    unit,
)

METHODS: dict[str, MethodEntry] = {
    "kfac": kfac.ENTRY,
    "foof": foof.ENTRY,
    "ekfac": ekfac.ENTRY,
    "unit": unit.ENTRY,
    "diag": diag.ENTRY,
    "layer": layer.ENTRY,
    "full": full.ENTRY,
    "kbfgs": kbfgs.ENTRY,
    "seng": seng.ENTRY,
    "psgd": psgd.ENTRY,
    "shampoo": shampoo.ENTRY,
    "soap": soap.ENTRY,
    "muon": muon.ENTRY,
}
