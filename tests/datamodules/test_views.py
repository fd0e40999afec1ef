"""Oracle: an image of the elevation above a tilted camera's horizon, in closed form, which shows its own up."""

import math

import numpy as np

from lightning_plugins.datamodules._views import draw_view

HEIGHT, WIDTH = 12, 24


def directions():
    colatitude = math.pi * (np.arange(HEIGHT)[:, None] + 0.5) / HEIGHT
    longitude = 2 * math.pi * ((np.arange(WIDTH) + 0.5) / WIDTH - 0.5)
    x, y = np.sin(colatitude) * np.cos(longitude), -np.sin(colatitude) * np.sin(longitude)
    return np.stack([x, y, np.broadcast_to(np.cos(colatitude), x.shape)], axis=2)


def test_up_turns_with_the_image():
    seen = set()
    for seed in range(20):
        view = draw_view(WIDTH, np.random.default_rng(seed))
        up = np.random.default_rng(seed).normal(size=3)
        np.testing.assert_allclose(view.turn(directions() @ up), directions() @ view.turn_direction(up), atol=1e-12)
        seen.add((view.mirrored, view.shift == 0))
    assert {mirrored for mirrored, _ in seen} == {False, True}


def test_colours_keep_the_order_of_brightness_and_the_range():
    image = np.linspace(0, 1, HEIGHT * WIDTH * 3, dtype=np.float32).reshape(HEIGHT, WIDTH, 3)
    for seed in range(5):
        view = draw_view(WIDTH, np.random.default_rng(seed))
        looked = view.look(image)
        assert looked.dtype == np.float32
        assert looked.min() >= 0
        assert looked.max() <= 1
        for channel in range(3):
            order = np.argsort(view.turn(image)[..., channel].ravel())
            assert (np.diff(looked[..., channel].ravel()[order]) >= 0).all()
