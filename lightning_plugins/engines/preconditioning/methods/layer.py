"""Layer-wise natural gradient: the full Fisher matrix of every layer, and nothing between layers.

    P_l = (F_l + lambda I)^-1 V_l        F_l = sum_n p_n p_n^T / terms, p_n the layer's own part

It is computed by the same block as ``full``, among the examples, with one Gram matrix ``K_l`` a layer. Paper: Ren and Goldfarb,
"Efficient Subsampled Gauss-Newton and Natural Gradient Methods for Training Neural Networks", 2019.
"""

from dataclasses import replace

from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.methods import full
from lightning_plugins.engines.preconditioning.methods.full import NaturalGradient, NaturalGradientSettings


def _make(layer: Layer, settings: NaturalGradientSettings, fisher: str) -> NaturalGradient:
    return NaturalGradient((layer,), settings, fisher)


ENTRY = replace(
    full.ENTRY,
    granularity="layer",
    memory="N^2 a layer, and inputs and output gradients of a step",
    make=_make,
    joint=False,
)
