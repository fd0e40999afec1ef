"""What curvature looks like: products, eigenvalues, spectral densities, tangent kernels, linear solves, and what methods cost."""

from lightning_plugins.engines.preconditioning.analysis.conjugate_gradients import Solution, conjugate_gradients
from lightning_plugins.engines.preconditioning.analysis.costs import Cost, count_costs, format_costs
from lightning_plugins.engines.preconditioning.analysis.eigenvalues import Eigenpairs, top_eigenpairs
from lightning_plugins.engines.preconditioning.analysis.operators import LinearOperator, MatrixOperator
from lightning_plugins.engines.preconditioning.analysis.products import CurvatureOperator
from lightning_plugins.engines.preconditioning.analysis.spectral_density import SpectralDensity, spectral_density
from lightning_plugins.engines.preconditioning.analysis.tangent_kernel import (
    TangentKernelOperator,
    kernel_eigenvalues,
    kernel_regression,
    tangent_kernel,
)

__all__ = [
    "Cost",
    "CurvatureOperator",
    "Eigenpairs",
    "LinearOperator",
    "MatrixOperator",
    "Solution",
    "SpectralDensity",
    "TangentKernelOperator",
    "conjugate_gradients",
    "count_costs",
    "format_costs",
    "kernel_eigenvalues",
    "kernel_regression",
    "spectral_density",
    "tangent_kernel",
    "top_eigenpairs",
]
