"""Oracle: the places of coloured pixels in the PNG, read by OpenCV, against the numbers that were drawn."""

import math

import numpy as np
import pytest

from lightning_plugins.reporting.memory_checkpoint import COLOURS, Blocked, draw_blocked_times

cv2 = pytest.importorskip("cv2")

RED, ORANGE = (214, 39, 40), (255, 127, 14)
# In the same colours as what is measured, lines that span both axes: 10 to 1000 MB, 1 to 1000 ms.
SPAN = [Blocked(10, 1, 1, 0), Blocked(1000, 1000, 1000, 0)]


def decode(png):
    return cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)


def places(picture, colour, tolerance=40):
    near = (np.abs(picture - np.asarray(colour)) <= tolerance).all(axis=-1)
    near[frame_rows(picture)[1] + 1 :] = False  # axis names and legend
    return np.nonzero(near)


def frame_rows(picture):
    rows = np.flatnonzero((picture.max(axis=-1) < 60).mean(axis=1) > 0.8)
    return rows.min(), rows.max()


def middle(values):
    return (values.min() + values.max()) / 2


def scale(picture):
    """Return column of 10 MB, pixels a decade of MB, row of 1 ms and pixels a decade of ms, from the dots of SPAN."""
    rows, columns = places(picture, RED)
    left, right = columns.min() + 4, columns.max() - 4
    top, bottom = rows.min() + 4, rows.max() - 4
    return left, (right - left) / 2, bottom, (bottom - top) / 3


def drawn(*points):
    picture = decode(draw_blocked_times({"nothing": [], "span": SPAN, "measured": points}))
    return picture, scale(picture), places(picture, ORANGE)


def test_a_dot_stands_at_its_size_and_its_median_on_logarithmic_axes():
    _, (left, per_size, bottom, per_time), (rows, columns) = drawn(Blocked(50, 30, 30, 0))
    assert (middle(columns) - left) / per_size == pytest.approx(math.log10(5), abs=0.02)
    assert (bottom - middle(rows)) / per_time == pytest.approx(math.log10(30), abs=0.04)


def test_a_bar_reaches_up_to_the_99th_percentile():
    _, (_, _, bottom, per_time), (rows, _) = drawn(Blocked(50, 10, 200, 0))
    assert (bottom - rows.min()) / per_time == pytest.approx(math.log10(200), abs=0.04)
    assert (bottom - rows.max() + 3) / per_time == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize(("longer_ms", "top_ms"), [(10, 20), (-5, 10), (0, 10)])
def test_a_ring_adds_the_longer_steps_where_they_are_longer(longer_ms, top_ms):
    _, (_, _, bottom, per_time), (rows, _) = drawn(Blocked(50, 10, 10, longer_ms))
    assert (bottom - rows.min()) / per_time == pytest.approx(math.log10(top_ms), abs=0.12)
    assert (bottom - rows.max()) / per_time == pytest.approx(1, abs=0.12)


def test_the_same_numbers_give_the_same_bytes_and_a_title_is_plain_text():
    assert draw_blocked_times({"one": SPAN}) == draw_blocked_times({"one": SPAN})
    untitled, titled = (decode(draw_blocked_times({"one": SPAN}, title)) for title in ("", r"costs $\unknown$"))
    assert frame_rows(titled)[0] > frame_rows(untitled)[0] + 10


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="at most 8 ways to save can be told apart, got 9; draw two"):
        draw_blocked_times({str(number): SPAN for number in range(len(COLOURS) + 1)})
    with pytest.raises(ValueError, match=r"must be above 0 .*median_ms=0.* for late"):
        draw_blocked_times({"late": [Blocked(50, 0, 1, 0)]})
