"""FOOF: K-FAC with the input factor alone, from forward passes only.

    P = V (A + lambda I)^-1

Paper: Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization", ICML 2022. It is K-FAC with
``G`` replaced by the identity, and is computed by the same block.
"""

from lightning_plugins.engines.preconditioning.blocks import MethodEntry
from lightning_plugins.engines.preconditioning.methods.kfac import KFAC, KFACSettings

ENTRY = MethodEntry(
    curvature="second moment of the inputs",
    granularity="layer, input side alone",
    solver="Cholesky",
    extra_passes="0",
    memory="2 I^2",
    fishers=("forward",),
    settings=KFACSettings,
    make=KFAC,
    symmetric_sums=True,
    damping=1.0,
)
