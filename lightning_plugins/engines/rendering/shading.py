"""Light in a room: lamps and windows with distance falloff, soft shadows of the strongest two, sun patches, darker corners.

    radiance = albedo * (ambient * occlusion + sum over lamps of colour * facing / (r^2 + radius^2) * visible) + gloss + emission

No light ever stands at the camera, so brightness tells nothing about distance. Shadows are read from a small spherical map
of the boxes, cast from the lamp by the same ray caster and looked up with bilinear weights, which softens their edges.
Occlusion is a product over the planes of the shell and the boxes near by of one less a rational function of the distance to
each, weighted by how far the surface faces it. Cost: about 20 passes over the image per lamp, 45 more per shadowed one.
"""

import numpy as np
import numpy.typing as npt

from lightning_plugins.engines.rendering.raycast import cast_boxes, corners, pixel_directions, windows
from lightning_plugins.engines.rendering.scene import Box, Lamp, Scene, Sun, Vector

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int16 = npt.NDArray[np.int16]

SHADOW_ROWS = 48
SHADOW_BIAS_M = 0.08
SHADOWED_LAMPS = 2
CORNER_REACH_M = 0.22
CONTACT_REACH_M = 0.35


def occlusion(scene: Scene, surface: Int16, points: Float32, normals: Float32, to_camera: Float64) -> Float32:
    """Return the share of ambient light that reaches each pixel."""
    open_share = np.ones(surface.shape, dtype=np.float32)
    for plane in scene.planes:
        used = [axis for axis in range(3) if plane.normal[axis] != 0.0]
        distance = points[used[0]] * (-plane.normal[used[0]] / CORNER_REACH_M)
        # How far the surface faces the plane: 1 towards it, 1/2 at a right angle, 0 for the plane itself.
        facing = normals[used[0]] * (0.2 * plane.normal[used[0]])
        for axis in used[1:]:
            distance -= points[axis] * (plane.normal[axis] / CORNER_REACH_M)
            facing += normals[axis] * (0.2 * plane.normal[axis])
        distance += plane.offset_m / CORNER_REACH_M
        distance *= distance
        distance += 1.0
        facing += 0.2
        facing /= distance
        open_share *= np.subtract(1.0, facing, out=facing)
    _contact(scene, surface, points, open_share, to_camera)
    return open_share


def _contact(scene: Scene, surface: Int16, points: Float32, open_share: Float32, to_camera: Float64) -> None:
    """Darken, in place, what is close to a box."""
    first = len(scene.planes)
    casting = [(first + 6 * number, box) for number, box in enumerate(scene.solids) if min(box.half_m) > 0.045]
    if not casting:
        return
    reach = CONTACT_REACH_M
    grown = [
        Box(box.centre_m, (box.half_m[0] + reach, box.half_m[1] + reach, box.half_m[2] + 0.15), box.yaw_rad, box.faces)
        for _, box in casting
    ]
    places = windows(corners(grown, scene.camera_m) @ to_camera.T, *surface.shape)
    for (base, box), place in zip(casting, places, strict=True):
        for rows, columns in place:
            face = surface[rows, columns]
            x, y = points[0, rows, columns] - box.centre_m[0], points[1, rows, columns] - box.centre_m[1]
            if box.yaw_rad != 0.0:
                c, s = float(np.cos(box.yaw_rad)), float(np.sin(box.yaw_rad))
                x, y = c * x + s * y, c * y - s * x
            squared = np.zeros_like(x)
            for along, half in zip((x, y, points[2, rows, columns] - box.centre_m[2]), box.half_m, strict=True):
                outside = np.abs(along)
                outside -= half
                np.maximum(outside, 0.0, out=outside)
                outside *= outside
                squared += outside
            # 0.45 in contact, 0 at the reach and beyond.
            squared *= -0.45 / (reach * reach)
            squared += 0.45
            np.maximum(squared, 0.0, out=squared)
            squared[(face >= base) & (face < base + 6)] = 0.0
            open_share[rows, columns] *= np.subtract(1.0, squared, out=squared)


def shadow_map(boxes: tuple[Box, ...], position_m: Vector) -> Float32:
    """Return inverse distances to the nearest box around a lamp, with a row more at each pole and a column more at the seam."""
    rows, columns = SHADOW_ROWS, 2 * SHADOW_ROWS
    inverse = np.zeros((rows, columns), dtype=np.float32)
    surface = np.zeros((rows, columns), dtype=np.int16)
    places = windows(corners(boxes, position_m), rows, columns)
    cast_boxes(boxes, 0, position_m, pixel_directions(rows, columns), places, inverse, surface)
    padded = np.empty((rows + 2, columns + 2), dtype=np.float32)
    padded[1:-1, 1:-1] = inverse
    padded[0, 1:-1], padded[-1, 1:-1] = inverse[0], inverse[-1]
    padded[:, 0], padded[:, -1] = padded[:, -2], padded[:, 1]
    return padded


def visibility(depths: Float32, x: Float32, y: Float32, z: Float32) -> Float32:
    """Return how much of a lamp each pixel sees, from a shadow map and the vector from lamp to pixel."""
    distance_m = np.sqrt(x * x + y * y + z * z)
    row = np.arccos(np.clip(z / distance_m, -1.0, 1.0)) * np.float32(SHADOW_ROWS / np.pi) + np.float32(0.5)
    column = np.arctan2(-y, x) * np.float32(SHADOW_ROWS / np.pi) + np.float32(SHADOW_ROWS + 0.5)
    i, j = row.astype(np.int32), column.astype(np.int32)
    row -= i
    column -= j
    width = depths.shape[1]
    index = i * width + j
    limit = 1.0 / np.maximum(distance_m - SHADOW_BIAS_M, 0.01)
    flat = depths.ravel()
    near, far = ((flat.take(index + step) < limit).astype(np.float32) for step in (0, width))
    near += column * ((flat.take(index + 1) < limit) - near)
    far += column * ((flat.take(index + width + 1) < limit) - far)
    far -= near
    far *= row
    return near + far


def lamp_light(lamp: Lamp, points: Float32, normals: Float32, depths: Float32 | None) -> Float32:
    """Return the share of a lamp's colour that falls on each pixel."""
    x, y, z = (points[axis] - lamp.position_m[axis] for axis in range(3))
    squared = x * x + y * y + z * z
    distance = np.sqrt(squared)
    # Lamps have a size: light bends a little around edges (0.15) and does not grow without bound close by.
    facing = -(normals[0] * x + normals[1] * y + normals[2] * z) / distance
    light = facing + 0.15
    np.maximum(light, 0.0, out=light)
    light /= squared * 1.15 + (0.3 + lamp.radius_m**2)
    if lamp.axis is not None:
        used = [axis for axis in range(3) if lamp.axis[axis] != 0.0]
        ahead = sum((x, y, z)[axis] * lamp.axis[axis] for axis in used) / distance
        light *= np.maximum(ahead, 0.0)
    if depths is not None:
        # Where light grazes, a cell of the map spans many depths: look up a little in front of the surface.
        lift = (1.0 - np.abs(facing)) * distance * 0.07
        light *= visibility(depths, x + lift * normals[0], y + lift * normals[1], z + lift * normals[2])
    return light


def sun_light(scene: Scene, sun: Sun, points: Float32, normals: Float32) -> Float32:
    """Return the patch of sunlight that comes in by a window: pixels whose way to the sun passes between its bars."""
    opening = scene.openings[sun.opening]
    axis = opening.front // 2
    other = 1 - axis
    pane = opening.box.centre_m[axis] + (0.5 - opening.front % 2) * 2.0 * opening.box.half_m[axis]
    travel = (pane - points[axis]) * (1.0 / sun.direction[axis])
    along = points[other] + travel * sun.direction[other] - opening.box.centre_m[other]
    high = points[2] + travel * sun.direction[2] - opening.box.centre_m[2]
    half_u, half_v = opening.box.half_m[other], opening.box.half_m[2]
    inside = (np.abs(along) < half_u - 0.03) & (np.abs(high) < half_v - 0.03) & (np.abs(along) > 0.03) & (travel > 0.05)
    facing = sum(normals[k] * sun.direction[k] for k in range(3))
    return np.where(inside, np.maximum(facing, 0.0), 0.0).astype(np.float32)


def add_highlights(scene: Scene, light: Float32, gloss: Float32, points: Float32, normals: Float32, rays: Float32) -> None:
    """Add, in place, what glossy surfaces mirror of lamps and windows, stronger at grazing angles."""
    shiny = np.flatnonzero(gloss > 0.02)
    if shiny.size == 0:
        return
    place, normal, ray = (field.reshape(3, -1).take(shiny, axis=1) for field in (points, normals, rays))
    cosine = (normal * ray).sum(axis=0)
    mirrored = ray - 2.0 * cosine * normal
    grazing = 1.0 + cosine
    strength = gloss.ravel().take(shiny) * (0.25 + 1.5 * grazing * grazing * grazing)
    added = np.zeros_like(place)
    for lamp in scene.lamps:
        x, y, z = (lamp.position_m[axis] - place[axis] for axis in range(3))
        squared = x * x + y * y + z * z
        shine = np.maximum(mirrored[0] * x + mirrored[1] * y + mirrored[2] * z, 0.0) / np.sqrt(squared)
        # Windows are broad: the 8th power of the cosine; lamps the 32nd.
        for _ in range(3 if lamp.axis is not None else 5):
            shine *= shine
        shine *= strength / (0.15 * squared + 0.3)
        for channel in range(3):
            added[channel] += shine * (1.6 * lamp.colour[channel])
    strength *= 0.6
    flat = light.reshape(3, -1)
    for channel in range(3):
        flat[channel, shiny] += added[channel] + strength * scene.ambient[channel]


def irradiance(scene: Scene, surface: Int16, points: Float32, normals: Float32, to_camera: Float64) -> Float32:
    """Return the light that falls on every pixel, ``(3, height, width)``."""
    open_share = occlusion(scene, surface, points, normals, to_camera)
    falls = np.empty_like(points)
    for channel in range(3):
        np.multiply(open_share, scene.ambient[channel], out=falls[channel])
    lamps = sorted(scene.lamps, key=lambda lamp: -sum(lamp.colour))
    # Thin things cast no shadow worth the time, and lamps none at all.
    casting = tuple(box for box in scene.solids if sorted(box.half_m)[1] > 0.05 and scene.materials[box.faces[0]].emission == 0.0)
    for rank, lamp in enumerate(lamps):
        depths = shadow_map(casting, lamp.position_m) if rank < SHADOWED_LAMPS and casting else None
        light = lamp_light(lamp, points, normals, depths)
        # Corners see less of the light that lamps throw on the other walls, too.
        light *= 0.5 + 0.5 * open_share
        for channel in range(3):
            falls[channel] += light * lamp.colour[channel]
    if scene.sun is not None:
        light = sun_light(scene, scene.sun, points, normals)
        for channel in range(3):
            falls[channel] += light * scene.sun.colour[channel]
    return falls
