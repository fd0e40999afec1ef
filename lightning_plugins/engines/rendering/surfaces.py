"""From surface numbers to what the light sees: place, normal, material and colour of every pixel.

Decals and bands only change a pixel's material. Pixels are then sorted by material, so that each texture runs once, on its
own pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_plugins.engines.rendering.raycast import Window, windows
from lightning_plugins.engines.rendering.scene import Scene, Vector
from lightning_plugins.engines.rendering.textures import TEXTURES

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int16 = npt.NDArray[np.int16]

# Of the faces -x, +x, -y, +y, -z, +z of a box: outward normal, and the axes of the face's coordinates.
FACE_NORMAL = np.array([(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)], dtype=np.float64)
FACE_U = np.array([(0, 1, 0), (0, 1, 0), (1, 0, 0), (1, 0, 0), (1, 0, 0), (1, 0, 0)], dtype=np.float64)
FACE_V = np.array([(0, 0, 1)] * 4 + [(0, 1, 0)] * 2, dtype=np.float64)


@dataclass(frozen=True)
class SurfaceTable:
    """Every surface of a scene: normals towards the room and coordinate axes ``(3, surfaces)``, material ``(surfaces,)``."""

    normal: Float32
    u_axis: Float32
    v_axis: Float32
    material: Int16


def surface_table(scene: Scene) -> SurfaceTable:
    """Return the table of a scene's surfaces, in their order."""
    boxes = scene.solids + tuple(opening.box for opening in scene.openings)
    yaw = np.array([box.yaw_rad for box in boxes])
    c, s, o, e = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw), np.ones_like(yaw)
    turns = np.array([[c, -s, o], [s, c, o], [o, o, e]]).transpose(2, 0, 1)
    # Openings are seen from inside.
    side = np.where(np.arange(len(boxes)) < len(scene.solids), 1.0, -1.0)[:, None, None]

    def table(of_planes: list[Vector], of_faces: Float64) -> Float32:
        return np.concatenate([np.array(of_planes), of_faces.reshape(-1, 3)]).T.astype(np.float32)

    inward = [tuple(-n for n in plane.normal) for plane in scene.planes]
    return SurfaceTable(
        table(inward, side * np.einsum("bij,fj->bfi", turns, FACE_NORMAL)),  # type: ignore[arg-type]
        table([plane.u_axis for plane in scene.planes], np.einsum("bij,fj->bfi", turns, FACE_U)),
        table([plane.v_axis for plane in scene.planes], np.einsum("bij,fj->bfi", turns, FACE_V)),
        np.array([plane.material for plane in scene.planes] + [m for box in boxes for m in box.faces], dtype=np.int16),
    )


def _rectangle(scene: Scene, table: SurfaceTable, surface: int, u: tuple[float, float], v: tuple[float, float]) -> Float64:
    """Return the corners of a rectangle on a surface, seen from the camera, ``(4, 3)`` in the room's frame."""
    u_axis, v_axis = table.u_axis[:, surface].astype(np.float64), table.v_axis[:, surface].astype(np.float64)
    normal = table.normal[:, surface].astype(np.float64)
    if surface < len(scene.planes):
        level = -scene.planes[surface].offset_m
    else:
        box = scene.solids[(surface - len(scene.planes)) // 6]
        level = float(normal @ np.array(box.centre_m)) + box.half_m[((surface - len(scene.planes)) % 6) // 2]
    points = [a * u_axis + b * v_axis + level * normal for a in u for b in v]
    return np.array(points) - np.array(scene.camera_m)


def materials_of_pixels(scene: Scene, table: SurfaceTable, surface: Int16, points: Float32, to_camera: Float64) -> Int16:
    """Return every pixel's material, with bands and decals painted.

    Args:
        points: ``(3, height, width)`` place of each pixel in the room's frame.
        to_camera: rotation from the room's frame to the pixels'.
    """
    material = table.material.take(surface)
    walls = np.zeros(table.material.shape, dtype=bool)
    walls[1:5] = True
    if scene.shape.endswith("l_shaped"):
        walls[len(scene.planes) : len(scene.planes) + 4] = True
    for band in scene.bands:
        inside = points[2] < band.high_m
        inside &= walls.take(surface)
        if band.low_m > 0.0:
            inside &= points[2] >= band.low_m
        np.copyto(material, band.material, where=inside)
    if not scene.decals:
        return material
    outlines = np.stack([_rectangle(scene, table, decal.surface, decal.u_m, decal.v_m) for decal in scene.decals])
    places: list[list[Window]] = windows(outlines @ to_camera.T, *surface.shape)
    for decal, place in zip(scene.decals, places, strict=True):
        for rows, columns in place:
            inside = surface[rows, columns] == decal.surface
            for axis, (low, high) in ((table.u_axis, decal.u_m), (table.v_axis, decal.v_m)):
                a, b, c = axis[:, decal.surface].tolist()
                coordinate = _dot(points[:, rows, columns], (a, b, c))
                inside &= coordinate > low
                inside &= coordinate < high
            np.copyto(material[rows, columns], decal.material, where=inside)
    return material


def _dot(points: Float32, axis: Vector) -> Float32:
    """Return the coordinate of points along an axis, skipping the axis's zeros."""
    total: Float32 | None = None
    for component, weight in zip(points, axis, strict=True):
        if weight != 0.0:
            term = component * weight
            total = term if total is None else total + term
    assert total is not None
    return total


def colours(
    scene: Scene, table: SurfaceTable, surface: Int16, material: Int16, points: Float32, footprint_m: Float32
) -> tuple[Float32, Float32, Float32]:
    """Evaluate every texture on its own pixels.

    Returns:
        albedo ``(3, height, width)``, and gloss and emission, ``(height, width)``.
    """
    shape = surface.shape
    order = np.argsort(material, axis=None, kind="stable")
    count = np.bincount(material.ravel(), minlength=len(scene.materials))
    ends = np.cumsum(count).tolist()
    place = points.reshape(3, -1).take(order, axis=1)
    face = surface.ravel().take(order)
    footprint = footprint_m.ravel().take(order)
    u, v = (
        place[0] * axis[0].take(face) + place[1] * axis[1].take(face) + place[2] * axis[2].take(face)
        for axis in (table.u_axis, table.v_axis)
    )
    mixed = np.empty(order.size, dtype=np.float32)
    shade = np.empty(order.size, dtype=np.float32)
    start = 0
    for number, end in enumerate(ends):
        if end > start:
            part = slice(start, end)
            look = scene.materials[number]
            pattern = TEXTURES[look.family]
            mixed[part], shade[part] = pattern(u[part] - look.origin_m[0], v[part] - look.origin_m[1], footprint[part], look)
            start = end
    np.maximum(shade, 0.05, out=shade)
    mixed_image, shade_image = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
    mixed_image.ravel()[order], shade_image.ravel()[order] = mixed, shade

    first = np.array([look.colour for look in scene.materials], dtype=np.float32).T
    step = np.array([look.second for look in scene.materials], dtype=np.float32).T - first
    albedo = np.empty((3, *shape), dtype=np.float32)
    for channel in range(3):
        np.multiply(step[channel].take(material), mixed_image, out=albedo[channel])
        albedo[channel] += first[channel].take(material)
        albedo[channel] *= shade_image
    np.clip(albedo, 0.004, 0.95, out=albedo)
    gloss = np.array([look.gloss for look in scene.materials], dtype=np.float32).take(material)
    emission = np.array([look.emission for look in scene.materials], dtype=np.float32).take(material)
    return albedo, gloss, emission
