"""Second-order directions: taps on layers, curvature, its inverse, and the gradient that they rewrite."""

from lightning_plugins.engines.preconditioning.methods import METHODS
from lightning_plugins.engines.preconditioning.plan import format_table
from lightning_plugins.engines.preconditioning.preconditioner import GradientPreconditioner

__all__ = ["METHODS", "GradientPreconditioner", "format_table"]
