"""Oracle: the places of coloured pixels in the PNG, read by OpenCV, against the numbers that were drawn."""

import math

import numpy as np
import pytest

from lightning_plugins.reporting.goodput import COLOURS, Run, draw_effective_share

cv2 = pytest.importorskip("cv2")

ORANGE, GREEN = (255, 127, 14), (44, 160, 44)
PLOT = 0.70  # of the height; axis names and legend are below


def decode(png):
    return cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)


def places(picture, colour, tolerance=40):
    near = (np.abs(picture - np.asarray(colour)) <= tolerance).all(axis=-1)
    near[int(PLOT * len(near)) :] = False
    return np.nonzero(near)


def frame_rows(picture):
    """Rows of 100 % and of 0 %."""
    rows = np.flatnonzero((picture.max(axis=-1) < 60).mean(axis=1) > 0.8)
    return rows.min(), rows.max()


def flat(share, low=1.0, high=100.0):
    return [(low, share), (high, share)]


def test_shares_are_percents_of_the_height_and_hours_are_logarithmic():
    curves = {"nothing": flat(-1), "some": flat(0.25), "most": [(1, 0.75), (10, 0.75)]}
    picture = decode(draw_effective_share(curves))
    top, bottom = frame_rows(picture)
    some, most = (np.median(places(picture, colour)[0]) for colour in (ORANGE, GREEN))
    assert (bottom - some) / (bottom - top) == pytest.approx(0.25, abs=0.01)
    assert (bottom - most) / (bottom - top) == pytest.approx(0.75, abs=0.01)
    assert np.ptp(places(picture, ORANGE)[1]) == pytest.approx(2 * np.ptp(places(picture, GREEN)[1]), rel=0.02)


def test_a_run_stands_at_its_hours_and_shares():
    curves = {"first": flat(0.1), "second": flat(0.2)}
    bare = decode(draw_effective_share(curves))
    columns = places(bare, ORANGE)[1]
    left, right = columns.min(), columns.max()
    runs = {
        name: decode(draw_effective_share(curves, {"second": Run(10, share, error, model)}))
        for name, share, error, model in (("exact", 0.6, 0.0, 0.6), ("uncertain", 0.6, 0.1, 0.6), ("off", 0.6, 0.0, 0.9))
    }
    found = {}
    for name, picture in runs.items():
        rows, columns = places(picture, ORANGE)
        above = rows < np.median(rows) - 20
        found[name] = (rows[above], columns[above])
    # The legend has become larger, so that the height of a percent comes from the pictures with the run themselves.
    percent = (np.median(places(runs["exact"], ORANGE)[0]) - np.median(found["exact"][0])) / 40
    assert percent > 1
    assert (np.median(found["exact"][1]) - left) / (right - left) == pytest.approx(math.log(10) / math.log(100), abs=0.01)
    assert np.ptp(found["uncertain"][0]) == pytest.approx(40 * percent, abs=6)  # twice the standard error, up and down
    assert np.median(found["off"][0]) - found["off"][0].min() == pytest.approx(30 * percent, abs=12)


def test_sources_are_lines_at_their_hours():
    curves = {"nothing": flat(-1), "some": flat(0.95)}
    bare, marked = (decode(draw_effective_share(curves, sources=sources)) for sources in (None, {"somebody": 20.0}))
    columns, counts = np.unique(np.nonzero(np.abs(bare - marked).max(axis=-1) > 60)[1], return_counts=True)
    ends = places(bare, ORANGE)[1]
    assert counts.max() > 60
    assert (columns[np.argmax(counts)] - ends.min()) / np.ptp(ends) == pytest.approx(math.log(20) / math.log(100), abs=0.01)


def test_the_same_numbers_give_the_same_bytes_and_a_title_is_plain_text():
    curves = {"one": flat(0.5)}
    assert draw_effective_share(curves) == draw_effective_share(curves)
    untitled, titled = (decode(draw_effective_share(curves, title=title)) for title in ("", r"costs $\unknown$"))
    assert frame_rows(titled)[0] > frame_rows(untitled)[0] + 10


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(ValueError, match="at most 8 curves can be told apart, got 9; draw two"):
        draw_effective_share({str(number): flat(0.5) for number in range(len(COLOURS) + 1)})
    with pytest.raises(ValueError, match="names of curves, got third; curves are first, second"):
        draw_effective_share({"first": flat(0.1), "second": flat(0.2)}, {"third": Run(1, 0.5, 0, 0.5)})
