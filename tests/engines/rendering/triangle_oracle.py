"""The oracle of the ray caster: the same room as explicit triangles in float64, every ray against every triangle.

It shares nothing with the engine's linear forms and windows: walls are the edges of the floor's outline (six for an L),
ceilings are the rectangle clipped where one slope meets the other, boxes are twelve triangles, and an opening is a hole in
its wall with five inner sides. Intersections are Moeller and Trumbore's.
"""

import numpy as np

QUADS = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]  # -x, +x, -y, +y, -z, +z


def directions(height, width):
    """Unit directions of the pixel centres, ``(height * width, 3)``."""
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    colat, lon = np.pi * (v + 0.5) / height, 2 * np.pi * ((u + 0.5) / width - 0.5)
    return np.stack([np.sin(colat) * np.cos(lon), -np.sin(colat) * np.sin(lon), np.cos(colat)], axis=-1).reshape(-1, 3)


def yaw_matrix(angle):
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


def box_corners(box):
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return (signs * box.half_m) @ yaw_matrix(box.yaw_rad).T + box.centre_m


def fan(polygon):
    return [(polygon[0], polygon[k], polygon[k + 1]) for k in range(1, len(polygon) - 1)]


def clipped(polygon, gradient, level):
    """The part of a floor polygon where ``gradient . p + level <= 0``."""
    kept = []
    for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        a, b = np.dot(gradient, p) + level, np.dot(gradient, q) + level
        if a <= 0:
            kept.append(p)
        if a * b < 0:
            kept.append(p + (q - p) * a / (a - b))
    return kept


def outline(scene, length, width):
    corner_points = [np.array(p) for p in ((0.0, 0.0), (length, 0.0), (length, width), (0.0, width))]
    if not scene.shape.endswith("l_shaped"):
        return corner_points
    notch = scene.solids[0]
    near, far = np.array(notch.centre_m[:2]) - notch.half_m[:2], np.array(notch.centre_m[:2]) + notch.half_m[:2]
    points = []
    for corner in corner_points:
        inside = np.all((corner >= near - 1e-9) & (corner <= far + 1e-9))
        if not inside:
            points.append(corner)
            continue
        inner = np.where(corner <= near + 1e-9, far, near)
        first, last = np.array([corner[0], inner[1]]), np.array([inner[0], corner[1]])
        before = corner_points[[tuple(p) for p in corner_points].index(tuple(corner)) - 1]
        if abs(before[0] - corner[0]) > 1e-9:  # we come along x, so we turn off before the corner in x
            first, last = last, first
        points += [first, inner, last]
    return points


def room_triangles(scene):
    """Triangles ``(count, 3, 3)`` and, for each, the openings (numbers) cut out of it."""
    length, width = scene.planes[2].offset_m, scene.planes[4].offset_m
    slopes = [(-p.normal[0] / p.normal[2], -p.normal[1] / p.normal[2], p.offset_m / p.normal[2]) for p in scene.planes[5:]]
    rectangle = [np.array(p) for p in ((0.0, 0.0), (length, 0.0), (length, width), (0.0, width))]
    triangles = fan([np.array([*p, 0.0]) for p in rectangle])
    for gx, gy, level in slopes:
        part = rectangle
        for hx, hy, other in slopes:
            if (gx, gy, level) != (hx, hy, other):
                part = clipped(part, (gx - hx, gy - hy), level - other)
        if len(part) > 2:
            triangles += fan([np.array([*p, gx * p[0] + gy * p[1] + level]) for p in part])
    walls = outline(scene, length, width)
    top = 20.0
    cut = [False] * len(triangles)
    for p, q in zip(walls, walls[1:] + walls[:1], strict=True):
        triangles += fan([np.array([*p, 0.0]), np.array([*q, 0.0]), np.array([*q, top]), np.array([*p, top])])
        cut += [True, True]
    solids = scene.solids[1:] if scene.shape.endswith("l_shaped") else scene.solids
    for box in solids:
        corners = box_corners(box)
        for quad in QUADS:
            triangles += fan([corners[k] for k in quad])
            cut += [False, False]
    for opening in scene.openings:
        corners = box_corners(opening.box)
        for face, quad in enumerate(QUADS):
            if face != opening.front:
                triangles += fan([corners[k] for k in quad])
                cut += [False, False]
    return np.array(triangles), cut


def oracle_depth(scene, rays):
    """Distance along each of ``(count, 3)`` unit rays from the scene's camera, in the room's frame."""
    origin = np.array(scene.camera_m)
    nearest = np.full(len(rays), np.inf)
    fronts = [box_corners(opening.box)[list(QUADS[opening.front])] for opening in scene.openings]
    triangles, cut = room_triangles(scene)
    for (a, b, c), has_holes in zip(triangles, cut, strict=True):
        edge, other = b - a, c - a
        p = np.cross(rays, other)
        determinant = p @ edge
        with np.errstate(divide="ignore", invalid="ignore"):
            u = p @ (origin - a) / determinant
            q = np.cross(origin - a, edge)
            v = rays @ q / determinant
            t = q @ other / determinant
        hit = (np.abs(determinant) > 1e-12) & (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9) & (t > 0) & (t < nearest)
        if has_holes:
            for front in fronts:
                normal = np.cross(front[1] - front[0], front[3] - front[0])
                if np.abs((np.stack([a, b, c]) - front[0]) @ normal).max() > 1e-6:
                    continue
                point = origin + np.where(hit, t, 0.0)[:, None] * rays
                hit &= ~np.all((point > front.min(axis=0) - 1e-9) & (point < front.max(axis=0) + 1e-9), axis=1)
        nearest = np.where(hit, t, nearest)
    return nearest
