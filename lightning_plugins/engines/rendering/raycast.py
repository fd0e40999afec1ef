"""Exact ray casting of a room into an equirectangular image, as inverse distances.

For a camera at the origin and a plane ``n . x = c``, the ray of unit direction ``d`` meets the plane at ``1/t = (n . d) /
c``: a linear form in ``d``. So the convex shell, seen from inside, is the LARGEST of its planes' forms, and a box, seen from
outside, is the SMALLEST of the forms of the (at most three) faces turned towards the camera, where that is larger than every
form of the other faces. There are no divisions and no special cases for parallel rays. An opening is a box behind a wall,
entered by its front face and met at its far side.

Every box is tried only on the window of pixels that can see it: the rectangle around the bounding cap of its corners, cut in
two at the seam. Cost: about 20 passes over the window of each box, in float32; relative error of depth about 1e-6.

Conventions: rows from zenith to nadir, colat = pi (v + 0.5) / H, lon = 2 pi ((u + 0.5) / W - 0.5), x forward, y left, z up,
d = (sin(colat) cos(lon), -sin(colat) sin(lon), cos(colat)).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

from lightning_plugins.engines.rendering.scene import Box, Scene

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Window = tuple[slice, slice]

CORNERS = np.array(list(product((-1.0, 1.0), repeat=3)))


@lru_cache(maxsize=8)
def pixel_directions(height: int, width: int) -> Float32:
    """Return the unit direction of every pixel, ``(3, height, width)``, read-only."""
    colat = np.pi * (np.arange(height) + 0.5) / height
    lon = 2.0 * np.pi * ((np.arange(width) + 0.5) / width - 0.5)
    directions = np.empty((3, height, width), dtype=np.float32)
    directions[0] = np.sin(colat)[:, None] * np.cos(lon)
    directions[1] = -np.sin(colat)[:, None] * np.sin(lon)
    directions[2] = np.cos(colat)[:, None]
    directions.setflags(write=False)
    return directions


def turn(yaw_rad: float) -> Float64:
    """Return the rotation about the vertical by ``yaw_rad``, counter-clockwise seen from above."""
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rotated(rotation: Float64, directions: Float32) -> Float32:
    """Return ``rotation @ directions`` for ``(3, ...)`` directions.

    Written out instead of ``matmul``: the sums of BLAS may depend on the number of threads, and rooms must not.
    """
    r = rotation.astype(np.float32)
    out = np.empty_like(directions)
    for i in range(3):
        np.multiply(directions[0], r[i, 0], out=out[i])
        out[i] += directions[1] * r[i, 1]
        out[i] += directions[2] * r[i, 2]
    return out


def windows(points: Float64, height: int, width: int) -> list[list[Window]]:
    """Return the pixels that can see each set of points or anything between them.

    Args:
        points: ``(sets, points, 3)`` in the camera's frame.

    Returns:
        for each set one window, or two where it crosses the seam.
    """
    unit = points / np.linalg.norm(points, axis=2, keepdims=True)
    centre = unit.sum(axis=1)
    centre /= np.maximum(np.linalg.norm(centre, axis=1, keepdims=True), 1e-9)
    cosine = np.einsum("bpi,bi->bp", unit, centre).min(axis=1)
    radius = np.arccos(np.clip(cosine, -1.0, 1.0)) + np.pi / height
    colat = np.arccos(np.clip(centre[:, 2], -1.0, 1.0))
    lon = np.arctan2(-centre[:, 1], centre[:, 0])
    polar = (cosine < 0.05) | (radius >= np.pi / 2) | (colat <= radius) | (colat >= np.pi - radius)
    spread = np.arcsin(np.clip(np.sin(radius) / np.maximum(np.sin(colat), 1e-9), 0.0, 1.0))
    # A cap of 90 degrees or more no longer bounds what lies between its points.
    everywhere = (cosine < 0.05) | (radius >= np.pi / 2)
    top = np.where(everywhere, 0, np.floor((colat - radius) * height / np.pi)).clip(0, height).astype(int).tolist()
    bottom = np.where(everywhere, height, np.ceil((colat + radius) * height / np.pi)).clip(0, height).astype(int).tolist()
    left = np.floor(((lon - spread) / (2 * np.pi) + 0.5) * width).astype(int) - 1
    right = np.ceil(((lon + spread) / (2 * np.pi) + 0.5) * width).astype(int) + 1
    whole = (polar | (right - left >= width)).tolist()
    found = []
    for r0, r1, c0, c1, full in zip(top, bottom, left.tolist(), right.tolist(), whole, strict=True):
        rows = slice(r0, r1)
        if full:
            found.append([(rows, slice(0, width))])
        elif c0 < 0:
            found.append([(rows, slice(c0 + width, width)), (rows, slice(0, c1))])
        elif c1 > width:
            found.append([(rows, slice(c0, width)), (rows, slice(0, c1 - width))])
        else:
            found.append([(rows, slice(c0, c1))])
    return found


def corners(boxes: Sequence[Box], viewpoint_m: Sequence[float]) -> Float64:
    """Return the corners of boxes as seen from a viewpoint, ``(boxes, 8, 3)``, in the room's frame."""
    half = np.array([box.half_m for box in boxes])
    yaw = np.array([box.yaw_rad for box in boxes])
    centre = np.array([box.centre_m for box in boxes]) - np.asarray(viewpoint_m)
    local = CORNERS[None] * half[:, None]
    c, s = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    out = np.stack([c * local[..., 0] - s * local[..., 1], s * local[..., 0] + c * local[..., 1], local[..., 2]], axis=-1)
    return out + centre[:, None]


def slabs(box: Box, viewpoint_m: Sequence[float], rays: Float32) -> tuple[list[tuple[Float32, int]], list[tuple[Float32, int]]]:
    """Return the inverse distances of a box's faces along rays: those turned to the viewpoint, and the others.

    Args:
        rays: ``(3, ...)`` unit directions in the room's frame.

    Returns:
        two lists of (inverse distance, face); the first is empty for a viewpoint inside the box.
    """
    x, y = box.centre_m[0] - viewpoint_m[0], box.centre_m[1] - viewpoint_m[1]
    along: list[Float32] = [rays[0], rays[1], rays[2]]
    if box.yaw_rad != 0.0:
        c, s = float(np.cos(box.yaw_rad)), float(np.sin(box.yaw_rad))
        along[0], along[1] = c * rays[0] + s * rays[1], c * rays[1] - s * rays[0]
        x, y = c * x + s * y, c * y - s * x
    entering, leaving = [], []
    for axis, middle in enumerate((x, y, box.centre_m[2] - viewpoint_m[2])):
        low, high = middle - box.half_m[axis], middle + box.half_m[axis]
        # Exactly on a face: a nanometre to the side, which float32 cannot tell apart.
        low, high = low or 1e-9, high or 1e-9
        faces = ((along[axis] * (1.0 / low), 2 * axis), (along[axis] * (1.0 / high), 2 * axis + 1))
        if low > 0.0:
            entering.append(faces[0])
            leaving.append(faces[1])
        elif high < 0.0:
            entering.append(faces[1])
            leaving.append(faces[0])
        else:
            leaving.extend(faces)
    return entering, leaving


def cast_boxes(
    boxes: Sequence[Box], first: int, viewpoint_m: Sequence[float], rays: Float32, places: list[list[Window]],
    inverse: Float32, surface: npt.NDArray[np.int16],
) -> None:  # fmt: skip
    """Draw solid boxes into a buffer of inverse distances and one of surface numbers, in place.

    Args:
        first: number of the first box's first face.
        places: the windows of each box.
    """
    for index, (box, place) in enumerate(zip(boxes, places, strict=True)):
        base = first + 6 * index
        for rows, columns in place:
            entering, leaving = slabs(box, viewpoint_m, rays[:, rows, columns])
            if not entering:
                continue
            behind = inverse[rows, columns]
            bound = np.maximum(behind, leaving[0][0])
            for form, _ in leaving[1:]:
                np.maximum(bound, form, out=bound)
            near = entering[0][0]
            for form, _ in entering[1:]:
                near = np.minimum(near, form)
            hit = near > bound
            np.copyto(behind, near, where=hit)
            target = surface[rows, columns]
            np.copyto(target, base + entering[0][1], where=hit)
            for form, face in entering[1:]:
                np.copyto(target, base + face, where=hit & (form == near))


def cast_openings(
    scene: Scene, first: int, rays: Float32, places: list[list[Window]], inverse: Float32, surface: npt.NDArray[np.int16]
) -> None:
    """Carve openings out of the surfaces they lie in: rays that pass the front go on to the far sides."""
    for index, (opening, place) in enumerate(zip(scene.openings, places, strict=True)):
        base = first + 6 * index
        for rows, columns in place:
            target = surface[rows, columns]
            entering, leaving = slabs(opening.box, scene.camera_m, rays[:, rows, columns])
            passed = target == opening.surface
            front = next((form for form, face in entering if face == opening.front), None)
            if front is None:
                continue  # in a wall that faces away from the camera
            far = leaving[0][0]
            for form, _ in leaving[1:]:
                far = np.maximum(far, form)
            passed &= front > far
            for form, face in entering:
                if face != opening.front:
                    passed &= front <= form
            np.copyto(inverse[rows, columns], far, where=passed)
            for form, face in leaving:
                np.copyto(target, base + face, where=passed & (form == far))


def cast(scene: Scene, rays: Float32, to_camera: Float64) -> tuple[Float32, npt.NDArray[np.int16]]:
    """Cast all rays of an image.

    Args:
        rays: ``(3, height, width)`` unit directions in the room's frame.
        to_camera: the rotation from the room's frame to the one in which the pixels are regular.

    Returns:
        inverse distances in 1/m and surface numbers, both ``(height, width)``.
    """
    height, width = rays.shape[1:]
    inverse: Float32 = np.zeros((height, width), dtype=np.float32)
    surface: npt.NDArray[np.int16] = np.zeros((height, width), dtype=np.int16)
    form = np.empty_like(inverse)
    for index, plane in enumerate(scene.planes):
        distance = plane.offset_m - sum(n * c for n, c in zip(plane.normal, scene.camera_m, strict=True))
        used = [axis for axis in range(3) if plane.normal[axis] != 0.0]
        np.multiply(rays[used[0]], plane.normal[used[0]] / distance, out=form)
        for axis in used[1:]:
            form += rays[axis] * (plane.normal[axis] / distance)
        nearer = form > inverse
        np.copyto(inverse, form, where=nearer)
        np.copyto(surface, index, where=nearer)
    boxes = scene.solids + tuple(opening.box for opening in scene.openings)
    if boxes:
        points = corners(boxes, scene.camera_m) @ to_camera.T
        places = windows(points, height, width)
        count = len(scene.solids)
        first = len(scene.planes)
        cast_boxes(scene.solids, first, scene.camera_m, rays, places[:count], inverse, surface)
        cast_openings(scene, first + 6 * count, rays, places[count:], inverse, surface)
    return inverse, surface
