"""Oracle: the places of coloured pixels in the PNG, read by OpenCV, against the numbers that were drawn."""

import numpy as np
import pytest

from lightning_plugins.reporting.survival import Death, draw_losses, draw_progress

cv2 = pytest.importorskip("cv2")

GREY, BLUE, GREEN, PURPLE, RED = (208, 208, 208), (31, 119, 180), (44, 160, 44), (148, 103, 189), (214, 39, 40)
FRAME, PLOT = 0.064, 0.84  # of the width; names of the axes are at the left, the legend is at the right
LOWER = 0.72  # of the height: the panel of differences is below


def decode(png):
    return cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)


def places(picture, colour, tolerance=25, top=0.0, bottom=1.0):
    near = (np.abs(picture - np.asarray(colour)) <= tolerance).all(axis=-1)
    height, width = near.shape
    near[:, : int(FRAME * width)] = near[:, int(PLOT * width) :] = False
    near[: int(top * height)] = near[int(bottom * height) :] = False
    return np.nonzero(near)


def line(first, last, slope, at=0.0):
    return [(x, at + slope * x) for x in np.linspace(first, last, 40).tolist()]


ALONE = line(0, 100, -0.01, at=2.0)


def test_the_killed_run_lies_on_top_of_the_other_and_takes_its_turn_at_its_steps():
    starts = [line(0, 60, -0.01, at=2.0), line(40, 100, -0.01, at=2.0)]
    picture = decode(draw_losses(ALONE, starts, []))
    band = places(picture, GREY, 6, bottom=LOWER)
    left, right = band[1].min(), band[1].max()
    for colour, first, last in ((BLUE, 0, 38), (GREEN, 41, 100)):  # where both were, the later lies on top
        rows, columns = places(picture, colour, bottom=LOWER)
        assert (columns.min() - left) / (right - left) == pytest.approx(first / 100, abs=0.03)
        assert (columns.max() - left) / (right - left) == pytest.approx(last / 100, abs=0.03)
        for column in np.unique(columns)[5:-5:40]:
            around = band[0][band[1] == column]
            assert around.min() - 1 <= rows[columns == column].mean() <= around.max() + 1


def test_a_run_that_differs_is_seen_to():
    same = decode(draw_losses(ALONE, [ALONE], []))
    assert np.ptp(places(same, BLUE, 10, top=LOWER)[0]) <= 3, "no difference is a level line"
    other = [(step, loss + (0.3 if step > 50 else 0.0)) for step, loss in ALONE]
    picture = decode(draw_losses(ALONE, [other], []))
    height = picture.shape[0]
    assert np.ptp(places(picture, BLUE, 10, top=LOWER)[0]) > 0.04 * height
    assert np.abs(picture[: int(LOWER * height)] - same[: int(LOWER * height)]).max() > 100
    least = decode(draw_losses(ALONE, [[(step, loss + 1e-9) for step, loss in ALONE]], []))
    apart = np.median(places(same, BLUE, 10, top=LOWER)[0]) - np.median(places(least, BLUE, 10, top=LOWER)[0])
    assert apart > 0.05 * height, "the least difference is as high as the panel"


def test_a_kill_stands_at_its_step_and_what_was_done_again_is_shaded():
    death = Death(seconds=5.0, step=60, process=1, resumed_after=40, back_s=7.0)
    bare, marked = (decode(draw_losses(ALONE, [ALONE], deaths)) for deaths in ([], [death]))
    band = places(bare, GREY, 6, bottom=LOWER)[1]
    left, right = band.min(), band.max()
    columns, counts = np.unique(places(marked, RED, 60, bottom=LOWER)[1], return_counts=True)
    assert (columns[np.argmax(counts)] - left) / (right - left) == pytest.approx(0.6, abs=0.01)
    pale = places(marked, (250, 229, 229), 4, top=0.3, bottom=LOWER)[1]
    assert (pale.min() - left) / (right - left) == pytest.approx(0.4, abs=0.01)
    assert (pale.max() - left) / (right - left) == pytest.approx(0.6, abs=0.01)


def test_progress_stands_still_for_the_seconds_that_going_on_takes():
    starts = [line(0, 4, 10), line(6, 8, 10, at=-30), line(9, 12, 10, at=-30)]
    deaths = [Death(4.0, 40, 0, 30, 6.0), Death(8.0, 50, 1, 50, 9.0)]
    picture = decode(draw_progress(line(0, 12, 10), starts, deaths))
    _, grey = places(picture, GREY, 6)
    second = (grey.max() - grey.min()) / 12
    reach = [places(picture, colour)[1] for colour in (BLUE, GREEN, PURPLE)]
    for (first_s, last_s), columns in zip(((0, 4), (6, 8), (9, 12)), reach, strict=True):
        assert (columns.min() - grey.min()) / second == pytest.approx(first_s, abs=0.2)
        assert (columns.max() - grey.min()) / second == pytest.approx(last_s, abs=0.4)  # a cross hides the end
    columns = places(picture, RED, 12)[1]
    for seconds in (4.0, 8.0):
        assert (np.abs(columns - (grey.min() + seconds * second)) < 6).sum() > 20, "a cross"
    steps_up = [np.median(places(picture, colour)[0]) for colour in (GREEN, PURPLE)]
    assert steps_up[1] < steps_up[0]


def test_the_same_numbers_give_the_same_bytes_and_no_kill_is_no_mark():
    for draw in (draw_losses, draw_progress):
        assert draw(ALONE, [ALONE], []) == draw(ALONE, [ALONE], [])
        assert len(places(decode(draw(ALONE, [ALONE], [])), RED)[0]) == 0
