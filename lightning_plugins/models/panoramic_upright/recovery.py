"""What levelling recovers of the depth error that tilt costs: four ways from a room to its depth, scored side by side.

    direct               the depth of the tilted image, as it is
    levelled             level by the estimated up, depth, turn the depth back
    levelled, true up    the same with the true up: what a perfect estimate is worth
    seen level           the depth of the same room from a camera that stands level: what there is to recover

    recovered = (AbsRel direct - AbsRel levelled) / (AbsRel direct - AbsRel seen level)

Radial depth is the same number from every orientation, so that turning it back only moves it. Source: the comparison is our own.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.engines.sphere import rotate_depth, rotate_equirectangular, rotation_from_up

WAYS = ("direct", "levelled", "levelled, true up", "seen level")


class TiltedRoom(NamedTuple):
    """A room from a tilted camera and from a level one.

    Attributes:
        sharp: ``(3, 2H, 4H)``, what the tilted camera sees, at twice the size of what depth is estimated from.
        up: ``(3,)``, true.
        image, depth, mask: ``(3, H, 2H)``, ``(1, H, 2H)`` in metres and ``(1, H, 2H)`` of the tilted camera.
        level_image, level_depth, level_mask: the same of the level one.
    """

    sharp: Tensor
    up: Tensor
    image: Tensor
    depth: Tensor
    mask: Tensor
    level_image: Tensor
    level_depth: Tensor
    level_mask: Tensor


@torch.no_grad()
def score_ways(
    rooms: Iterable[TiltedRoom],
    estimate_up: Callable[[Tensor], Tensor],
    estimate_depth: Callable[[Tensor], Tensor],
    metrics: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Return a row per way: ``way``, the figures of the metrics, ``recovered`` in percent of AbsRel, ``images``.

    Args:
        rooms: to judge on.
        estimate_up: takes an image ``(3, 2H, 4H)``, returns up ``(3,)``.
        estimate_depth: takes images ``(1, 3, H, 2H)``, returns depth ``(1, 1, H, 2H)`` in metres.
        metrics: makes a metric with ``update(depth, truth, mask)``, ``compute()`` with ``abs_rel``, and ``images``.
    """
    scores = {way: metrics() for way in WAYS}
    for room in rooms:
        truth, mask = room.depth[None], room.mask[None]
        scores["direct"].update(estimate_depth(room.image[None]), truth, mask)
        for way, up in (("levelled", estimate_up(room.sharp)), ("levelled, true up", room.up)):
            scores[way].update(depth_by_levelling(room.sharp[None], up, estimate_depth), truth, mask)
        scores["seen level"].update(estimate_depth(room.level_image[None]), room.level_depth[None], room.level_mask[None])
    figures = {way: {name: float(figure) for name, figure in metric.compute().items()} for way, metric in scores.items()}
    direct, level = figures["direct"]["abs_rel"], figures["seen level"]["abs_rel"]
    lost = direct - level
    return [
        {
            "way": way,
            **figures[way],
            # Nothing of a negative loss is -0.0.
            "recovered_percent": round(100 * (direct - figures[way]["abs_rel"]) / lost, 1) + 0.0 if lost else "",
            "images": int(scores[way].images),
        }
        for way in WAYS
    ]


def depth_by_levelling(sharp: Tensor, up: Tensor, estimate_depth: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the depth ``(1, 1, H, 2H)`` of a tilted image, estimated from its level one and turned back.

    Args:
        sharp: ``(1, 3, 2H, 4H)``; turned at this size and then halved, the level image is as sharp as a camera's.
        up: ``(3,)``.
        estimate_depth: as ``score_ways`` takes it.
    """
    rotation = rotation_from_up(up)
    level = F.avg_pool2d(rotate_equirectangular(sharp, rotation, "bicubic").clamp(0, 1), 2)
    depth = estimate_depth(level)
    back, _ = rotate_depth(depth, torch.ones_like(depth, dtype=torch.bool), rotation.mT)
    return back
