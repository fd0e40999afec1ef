"""Losses of panoramic depth: berHu for depth, masked distances for the distillation of latent features.

    berHu(e) = e                        where e <= c
               (e^2 + c^2) / (2 c)      elsewhere,        c = threshold x (largest e of the image)

Papers: Laina et al., 3DV 2016 (berHu); Liu et al., arXiv 2405.16858 (a teacher's latent depth features). The second leaves its
distance open, so three stand here under one signature. Threshold and mean are taken per image, and the images are averaged:
the loss of a batch is then the mean of the losses of its shards, and two ranks equal one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the valid pixels of each image; 0 where an image has none.

    Args:
        values: ``(B, C, H, W)``.
        mask: weights ``(B, 1, H, W)``, 0 at invalid pixels.

    Returns:
        ``(B,)``.
    """
    weight = mask.to(values.dtype).expand_as(values)
    return (values * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=1e-6)


def berhu(prediction_m: Tensor, depth_m: Tensor, mask: Tensor, threshold: float = 0.2) -> Tensor:
    """Return the reverse Huber loss in metres, a scalar.

    Args:
        prediction_m: predicted depth in metres, ``(B, 1, H, W)``.
        depth_m: true depth in metres, ``(B, 1, H, W)``; what stands at invalid pixels does not matter.
        mask: True at valid pixels, ``(B, 1, H, W)``.
        threshold: c as a share of the image's largest error.
    """
    error = torch.where(mask, prediction_m - depth_m, 0.0).abs()
    c = (threshold * error.detach().amax(dim=(1, 2, 3), keepdim=True)).clamp(min=1e-6)
    loss = torch.where(error <= c, error, (error.square() + c.square()) / (2 * c))
    return masked_mean(loss, mask).mean()


def berhu_log(prediction_m: Tensor, depth_m: Tensor, mask: Tensor) -> Tensor:
    """Return the reverse Huber loss of the logarithms: 10 % too far costs the same near and far, as it does in AbsRel. A scalar.

    Args:
        prediction_m: as in ``berhu``, positive.
        depth_m: as in ``berhu``, positive where valid.
        mask: as in ``berhu``.
    """
    return berhu(prediction_m.clamp(min=0.01).log(), torch.where(mask, depth_m, 1.0).clamp(min=0.01).log(), mask)


def l1_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean absolute difference of two feature maps ``(B, C, h, w)`` at valid pixels, a scalar."""
    return masked_mean((student - teacher).abs(), mask).mean()


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return one minus the cosine between the two feature vectors of each valid pixel, averaged, a scalar."""
    return masked_mean(1 - F.cosine_similarity(student, teacher, dim=1, eps=1e-6).unsqueeze(1), mask).mean()


def affinity_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean absolute difference of the cosine affinities between all pairs of valid pixels, a scalar.

    The maps are pooled to at most 8 x 16 cells first: the affinity matrix has the square of the number of cells.
    """
    size = (min(8, student.shape[-2]), min(16, student.shape[-1]))
    weight = F.adaptive_avg_pool2d(mask.to(student.dtype), size).flatten(2)
    pairs = weight.transpose(1, 2) * weight

    def affinity(features: Tensor) -> Tensor:
        unit = F.normalize(F.adaptive_avg_pool2d(features, size).flatten(2), dim=1)
        return unit.transpose(1, 2) @ unit

    return masked_mean((affinity(student) - affinity(teacher)).abs().unsqueeze(1), pairs.unsqueeze(1)).mean()


DEPTH_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"berhu": berhu, "berhu_log": berhu_log}

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
DISTANCES: dict[str, Distance] = {"l1": l1_distance, "cosine": cosine_distance, "affinity": affinity_distance}


def distillation(student: list[Tensor], teacher: list[Tensor], mask: Tensor, distance: Distance) -> Tensor:
    """Return the mean over scales of the distance between two feature pyramids, a scalar.

    Args:
        student: adapted features of each scale, ``(B, C_s, h_s, w_s)``.
        teacher: features of the same shapes; no gradient flows into them.
        mask: True at valid pixels of the image, ``(B, 1, H, W)``; a cell of a scale counts by its valid share.
    """
    total = torch.zeros((), dtype=student[0].dtype, device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        cells = F.adaptive_avg_pool2d(mask.to(ours.dtype), (ours.shape[-2], ours.shape[-1]))
        total = total + distance(ours, theirs.detach(), cells)
    return total / len(student)
