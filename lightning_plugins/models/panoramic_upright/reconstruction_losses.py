"""What the reconstruction of level images is trained with; all means are taken over the sphere.

    L1      mean |p - t|
    edges   mean |(p - p_right) - (t - t_right)| + |(p - p_below) - (t - t_below)|
    least squares for the discriminator's scores:  mean (D(t) - 1)^2 + D(p)^2,  and for the generator  mean (D(p) - 1)^2

Paper: Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017, without the factor 1/2. Chen, Li, Li, arXiv
2304.05556, call theirs a light GAN; which one, their abstract leaves open. Of the two usual ones least squares needs no spectral
norm to stay bounded: near the optimum its gradient vanishes, where that of the hinge is constant.
"""

from torch import Tensor

from lightning_plugins.engines.sphere import solid_angles


def spherical_mean(values: Tensor) -> Tensor:
    """Return the mean over the sphere, and over images and channels, of ``(B, C, H, W)``; a scalar."""
    weight = solid_angles(*values.shape[2:], dtype=values.dtype, device=values.device)
    return (values.mean(dim=(0, 1, 3)) * weight).sum() / weight.sum()


def reconstruction_l1(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return the mean absolute difference of images ``(B, C, H, W)``, a scalar."""
    return spherical_mean((prediction - truth).abs())


def edge_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return how much the differences between neighbouring pixels are off, a scalar; columns wrap at the seam.

    Args:
        prediction: ``(B, C, H, W)``.
        truth: likewise.
    """
    error = prediction - truth
    return spherical_mean((error - error.roll(-1, dims=3)).abs()) + spherical_mean(error.diff(dim=2).abs())


def discriminator_loss(scores_of_true: Tensor, scores_of_made: Tensor) -> Tensor:
    """Return the discriminator's loss of its scores ``(B, 1, h, w)`` of true and of made images, a scalar."""
    return spherical_mean((scores_of_true - 1).square()) + spherical_mean(scores_of_made.square())


def adversarial_loss(scores_of_made: Tensor) -> Tensor:
    """Return the generator's loss: how far the scores ``(B, 1, h, w)`` are from those of true images, a scalar."""
    return spherical_mean((scores_of_made - 1).square())
