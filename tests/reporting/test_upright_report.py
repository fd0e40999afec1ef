"""The upright pictures, by what is in their axes and pixels."""

import io

import numpy as np
from PIL import Image

from lightning_plugins.reporting import upright_report
from lightning_plugins.reporting.upright_report import draw_before_and_after, draw_cumulative, draw_errors


def opened(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def figures(monkeypatch):
    """Keep what is drawn."""
    drawn = []
    to_png = upright_report.to_png
    monkeypatch.setattr(upright_report, "to_png", lambda figure: drawn.append(figure) or to_png(figure))
    return drawn


def test_a_curve_passes_through_the_shares(monkeypatch):
    drawn = figures(monkeypatch)
    errors = {"network": np.array([1.0, 2.0, 4.0, 50.0]), "identity": np.array([11.0, 11.5, 13.0, 170.0])}
    picture = opened(draw_cumulative({"rooms": errors, "photographs": errors, "more": errors}))
    assert picture.shape[1] == 1200
    axes = drawn[0].axes[0]
    assert axes.get_title() == "rooms (4 images)"
    line = next(line for line in axes.lines if line.get_label() == "network")
    steps, shares = line.get_data()
    at = lambda degrees: shares[np.searchsorted(steps, degrees, side="right") - 1]  # noqa: E731
    assert [at(degrees) for degrees in (0.5, 1.5, 3, 10, 60)] == [0, 25, 50, 75, 100]
    assert not drawn[0].axes[3].axison


def test_every_error_is_in_the_histogram(monkeypatch):
    drawn = figures(monkeypatch)
    draw_errors({"rooms": {"network": np.array([0.0, 0.01, 1.0, 180.0])}})
    (outline,) = drawn[0].axes[0].patches
    # An outline of steps: each bin's height stands over its edges.
    assert outline.get_xy()[:, 1].max() == 2
    assert outline.get_xy()[-2, 1] == 1


def test_before_and_after_mark_the_horizon():
    before, after = (np.full((64, 128, 3), value, np.uint8) for value in (40, 200))
    picture = opened(draw_before_and_after(before, after, "attic: tilted by $5$ degrees"))
    assert (picture == 40).all(axis=2).sum() > 1000
    assert (picture == 200).all(axis=2).sum() > 1000
    red = (picture[..., 0] > 200) & (picture[..., 1] < 120)
    assert red.sum() > 100
