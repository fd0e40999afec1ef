"""Oracle: a room of painted boards, ray-cast here in numpy from a camera whose tilt is known."""

import numpy as np
import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.models.panoramic_upright.vertical_lines import estimate_up_from_lines, find_segments

pytest.importorskip("cv2")
HEIGHT = 192


def turn(axis, angle_deg):
    """Rodrigues' formula."""
    x, y, z = np.asarray(axis, dtype=np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(angle_deg)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def pixel_rays(height):
    """Unit vectors ``(3, 3 height, 6 height)``: three by three a pixel."""
    fine = 3 * height
    colatitude = np.pi * (np.arange(fine)[:, None] + 0.5) / fine
    longitude = 2 * np.pi * ((np.arange(2 * fine) + 0.5) / (2 * fine) - 0.5)
    sine, cosine = np.sin(colatitude), np.cos(colatitude)
    return np.stack([sine * np.cos(longitude), -sine * np.sin(longitude), cosine + 0 * longitude])


def develop(grey):
    """Average the rays of each pixel: ``(3 height, 6 height)`` to ``(1, height, 2 height)``."""
    height = len(grey) // 3
    return torch.from_numpy(grey.reshape(height, 3, 2 * height, 3).mean(axis=(1, 3))).float()[None]


def photograph(room_from_camera, slanted=False, height=HEIGHT):
    """A box of 6 x 5 x 2.8 m with boards of its own grey on each face; one wall's boards may lean by 35 degrees."""
    rays = np.einsum("ij,jvu->ivu", room_from_camera, pixel_rays(height))
    half, camera = np.array([3.0, 2.5, 1.4])[:, None, None], np.array([0.7, -0.4, 0.2])[:, None, None]
    distances = (np.sign(rays) * half - camera) / rays
    face = distances.argmin(axis=0)
    points = camera + rays * distances.min(axis=0)
    grey = np.zeros(face.shape)
    paint = np.random.default_rng(5).uniform(0.1, 0.9, size=(3, 2, 16, 16))
    for axis in range(3):
        for side in range(2):
            here = (face == axis) & ((rays[axis] > 0) == side)
            p, q = (points[other][here] for other in range(3) if other != axis)
            if slanted and axis == 0 and side == 1:
                cosine, sine = np.cos(np.radians(35)), np.sin(np.radians(35))
                p, q = cosine * p - sine * q, sine * p + cosine * q
            grey[here] = paint[axis, side, np.floor(p / 0.8).astype(int) + 8, np.floor(q / 0.7).astype(int) + 8]
    return develop(grey)


def error_deg(estimate, truth):
    found = estimate.up.double().numpy()
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(found, truth)), found @ truth))


YAW = turn((0, 0, 1), 25)


@pytest.mark.parametrize("normal", [(1, 0.2, 0.1), (-0.3, 0.5, 0.9)])
def test_segments_lie_on_the_one_edge_there_is(normal):
    normal = np.array(normal) / np.linalg.norm(normal)
    segments = find_segments(develop((np.einsum("i,ivu->vu", normal, pixel_rays(HEIGHT)) > 0) * 0.6 + 0.2)[0])
    off_deg = np.degrees(np.arcsin(np.linalg.norm(np.cross(segments.normal, normal), axis=1)))
    assert off_deg.max() < 0.6
    assert np.abs(segments.middle @ normal).max() < np.radians(0.3)
    assert 360 < np.degrees(segments.angle_rad.sum()) < 500  # all around, more where two views overlap


@pytest.mark.parametrize("tilt_deg", [0, 3, 10, 20, 40])
@pytest.mark.parametrize("slanted", [False, True])
def test_finds_up_within_a_degree(tilt_deg, slanted):
    room_from_camera = YAW @ turn((0.3, 0.8, 0), tilt_deg)
    estimate = estimate_up_from_lines(photograph(room_from_camera, slanted))
    assert error_deg(estimate, room_from_camera[2]) < min(1.0, 3 * estimate.angle_sigma_deg)
    assert 0.15 < estimate.support < 0.6  # a third of the edges in the room are vertical, less what leans
    assert estimate.line_count >= 10


def test_finds_up_in_noise():
    room_from_camera = YAW @ turn((1, 0, 0), 15)
    image = photograph(room_from_camera)
    noisy = (image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert error_deg(estimate_up_from_lines(noisy), room_from_camera[2]) < 1


def test_bytes_in_three_channels_and_large_images_will_do():
    room_from_camera = YAW @ turn((1, 1, 0), 12)
    image = (photograph(room_from_camera, height=560).expand(3, -1, -1) * 255).round().byte()
    assert error_deg(estimate_up_from_lines(image), room_from_camera[2]) < 0.5


def test_a_camera_upside_down_gets_minus_up():
    room_from_camera = YAW @ turn((1, 0, 0), 172)
    assert error_deg(estimate_up_from_lines(photograph(room_from_camera)), -room_from_camera[2]) < 1


def test_a_camera_on_its_side_gets_the_horizontal_direction_within_reach():
    room_from_camera = YAW @ turn(YAW.T[:, 1], 65)  # about the room's y, so that its x comes to lie 25 degrees from +z
    image = photograph(room_from_camera)
    assert error_deg(estimate_up_from_lines(image), room_from_camera[0]) < 1
    restricted = estimate_up_from_lines(image, max_tilt_deg=15)
    assert restricted is None or error_deg(restricted, np.array([0, 0, 1])) < 16


@pytest.mark.parametrize(
    "image",
    [
        torch.full((3, 64, 128), 0.5),
        torch.zeros(1, 64, 128, dtype=torch.uint8),
        torch.linspace(0, 1, 64)[None, :, None].expand(3, -1, 128),
        torch.rand((3, 128, 256), generator=torch.Generator().manual_seed(0)),
    ],
    ids=["grey", "black", "sky", "noise"],
)
def test_images_without_lines_give_no_cue(image):
    assert estimate_up_from_lines(image) is None


@pytest.mark.parametrize(("toward_zenith", "strokes"), [(0.0, 40), (5.0, 30)], ids=["everywhere", "about the zenith"])
def test_lines_in_all_directions_give_no_cue(toward_zenith, strokes):
    generator = np.random.default_rng(0)
    rays, grey = pixel_rays(HEIGHT), np.full((3 * HEIGHT, 6 * HEIGHT), 0.5)
    for _ in range(strokes):
        middle, aside = generator.normal(size=(2, 3))
        middle[2] += toward_zenith
        middle, normal = (v / np.linalg.norm(v) for v in (middle, np.cross(middle, aside)))
        stroke = (np.abs(np.einsum("i,ivu->vu", normal, rays)) < 0.012) & (np.einsum("i,ivu->vu", middle, rays) > 0.985)
        grey[stroke] = generator.choice([0.1, 0.9])
    image = develop(grey)
    assert len(find_segments(image[0])) > 20
    assert estimate_up_from_lines(image) is None


def test_the_same_seed_gives_the_same_estimate_whatever_else_is_drawn():
    image = photograph(YAW @ turn((0, 1, 0), 7), slanted=True)
    first = estimate_up_from_lines(image)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    second = estimate_up_from_lines(image)
    assert torch.equal(first.up, second.up)
    assert (first.angle_sigma_deg, first.support, first.line_count) == (second.angle_sigma_deg, second.support, second.line_count)


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(3, 64, 120),
        torch.rand(3, 32, 64),
        torch.rand(2, 64, 128),
        torch.rand(1, 64, 128, 3),
        torch.ones(3, 64, 128).int(),
    ],
    ids=["not 2:1", "small", "two channels", "four axes", "integers"],
)
def test_other_images_are_refused(image):
    with pytest.raises(InputError, match=r"image must be \(1 or 3, H, 2 H\).*got \("):
        estimate_up_from_lines(image)


@pytest.mark.parametrize("angle", [0, 91, float("nan")])
def test_other_tilts_are_refused(angle):
    with pytest.raises(InputError, match="max_tilt_deg must be above 0 and at most 90"):
        estimate_up_from_lines(torch.rand(3, 64, 128), max_tilt_deg=angle)
