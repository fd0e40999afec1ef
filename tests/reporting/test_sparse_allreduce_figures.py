"""Oracle: the geometry of the PNG's pixels, read by OpenCV, against the numbers that were drawn."""

import math

import numpy as np
import pytest

from lightning_plugins.reporting import sparse_allreduce as figures

cv2 = pytest.importorskip("cv2")

RED, BLACK, ORANGE, BLUE, GREY = (214, 39, 40), (0, 0, 0), (255, 127, 14), (31, 119, 180), (105, 105, 105)


def decode(png):
    return cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)


def places(picture, colour, tolerance=12, left=0.0, right=0.79):
    """Rows and columns of a colour, without the legend at the right."""
    near = (np.abs(picture - np.asarray(colour)) <= tolerance).all(axis=-1)
    width = near.shape[1]
    near[:, : int(left * width)] = near[:, int(right * width) :] = False
    return np.nonzero(near)


def runs(columns):
    """Groups of neighbouring columns."""
    columns = np.unique(columns)
    return np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)


def test_bars_are_as_high_as_the_load():
    png = figures.draw_receive_load(
        {"average cuts": [40.0, 0.0, 80.0], "histogram cuts": [20.0, 40.0, 60.0]}, 50.0, "a title", "bound"
    )
    picture = decode(png)
    red, grey = (
        [np.isin(columns, run).sum() / len(run) for run in runs(columns) if len(run) > 10]  # area over width: the mean height
        for columns in (places(picture, RED)[1], places(picture, GREY, tolerance=2)[1])
    )
    np.testing.assert_allclose(np.array(red) / red[0], [1, 2, 3], rtol=0.03)
    np.testing.assert_allclose(np.array(grey) / red[0], [2, 4], rtol=0.03)


def test_the_band_is_as_wide_as_its_factor_and_dots_are_drawn_on_it():
    band = [(ranks, 2e6, 6e6) for ranks in (8, 64)]
    curves = {"dense": [(8, 1e8), (64, 1e8)], "Ok-Topk": [(8, 3e6), (64, 3e6)]}
    bare = decode(figures.draw_bytes_per_rank(curves, band, bound_name="2k to 6k"))
    dense, ours = (np.median(places(bare, colour, left=0.2)[0]) for colour in (BLACK, RED))
    picture = decode(figures.draw_bytes_per_rank(curves, band, {"Ok-Topk": [(8, 3e6)]}, bound_name="2k to 6k"))
    assert len(places(picture, RED)[0]) > len(places(bare, RED)[0]) + 30
    decade = (dense - ours) / math.log10(1e8 / 3e6)  # pixels, negative as rows count downwards
    pale = places(bare, (249, 212, 212), tolerance=12, left=0.3, right=0.5)[0]
    assert np.ptp(pale) == pytest.approx(-decade * math.log10(3), abs=3)
    assert pale.min() < ours < pale.max()


def test_crossovers_of_power_laws():
    dense = [(x, 1e9 / x) for x in (1e7, 1e8, 1e9, 1e10)]
    flat = [(x, 0.4) for x, _ in dense]
    assert figures.crossovers(flat, dense) == [pytest.approx((2.5e9, 0.4))]
    assert figures.crossovers(dense, flat) == [pytest.approx((2.5e9, 0.4))]
    assert figures.crossovers([(x, 0.1) for x, _ in dense], [(x, 0.2) for x, _ in dense]) == []
    on_a_point = [(x, 1.0) for x, _ in dense]
    assert figures.crossovers(on_a_point, dense) == [pytest.approx((1e9, 1.0))]
    with pytest.raises(ValueError, match="same coordinates"):
        figures.crossovers(flat[1:], dense)
    with pytest.raises(ValueError, match="all positive"):
        figures.crossovers([(x, 0.0) for x, _ in dense], dense)


def test_the_crossing_stands_at_its_bandwidth():
    bandwidths = (1e7, 1e8, 1e9, 1e10)
    picture = decode(
        figures.draw_step_times({"dense": [(x, 1e9 / x) for x in bandwidths], "Ok-Topk": [(x, 0.4) for x in bandwidths]}, "dense")
    )
    _, columns = places(picture, RED, tolerance=60)
    number, count = np.unique(columns, return_counts=True)
    share = (number[np.argmax(count)] - columns.min()) / np.ptp(columns)
    assert share == pytest.approx(math.log10(250) / 3, abs=0.01)


def test_every_quantity_has_its_panel():
    runs_ = {
        name: {
            "loss": [2.0, 1.0, 0.5],
            "step": [0, 1, 2],
            "seconds": [0, 1 * cost, 2 * cost],
            "bytes sent": [0, 1e6 * cost, 2e6 * cost],
        }
        for name, cost in (("dense", 4.0), ("Ok-Topk", 1.0))
    }
    picture = decode(figures.draw_training(runs_, ["step", "seconds", "bytes sent"], "losses"))
    reach = [
        [np.ptp(panel) for panel in runs(places(picture, colour, right=0.885)[1]) if len(panel) > 20] for colour in (RED, ORANGE)
    ]
    steps, seconds, sent = reach[0]
    assert seconds == pytest.approx(steps / 4, rel=0.05)
    assert sent == pytest.approx(steps / 4, rel=0.05)
    assert reach[1] == []


def test_selected_counts_stand_above_and_below_k():
    picture = decode(
        figures.draw_selected({"servo": [(0, 1.0), (10, 1.0)], "reused": [(0, 2.0), (10, 2.0)], "fit": [(0, 0.5), (10, 0.5)]})
    )
    servo, reused, fit = (np.median(places(picture, colour, 40)[0]) for colour in (BLUE, (188, 189, 34), (227, 119, 194)))
    assert servo - reused == pytest.approx(fit - servo, abs=2)  # a logarithmic axis
    assert servo - reused > 50


def test_a_breakdown_is_as_long_as_its_phases():
    seconds = {"one": {"select": 0.1, "split_and_reduce": 0.2}, "two": {"split_and_reduce": 0.4}}
    picture = decode(figures.draw_breakdown(seconds))
    rows, columns = places(picture, ORANGE)  # the second phase
    split = rows < (rows.min() + rows.max()) / 2
    first, second = columns[split], columns[~split]
    assert np.ptp(second) == pytest.approx(2 * np.ptp(first), rel=0.03)
    select = places(picture, BLUE)[1]
    assert np.ptp(select) == pytest.approx(np.ptp(first) / 2, rel=0.05)
    assert select.max() + 1 == pytest.approx(first.min(), abs=2)


def test_scaling_has_the_fast_assumptions_left_and_the_slow_ones_right():
    picture = decode(
        figures.draw_scaling({"Ok-Topk": [(8, 0.01, 1.0), (64, 0.01, 1.0)], "dense": [(8, 0.1, 0.1), (64, 0.1, 0.1)]})
    )
    fast, slow = (np.median(places(picture, RED, left=left, right=right)[0]) for left, right in ((0.05, 0.42), (0.46, 0.8)))
    height = picture.shape[0]
    assert fast - slow > height / 2


def test_exact_conservation_stands_at_the_floor():
    steps = range(20)
    picture = decode(
        figures.draw_mass(
            {"Ok-Topk": [(s, 0.0) for s in steps], "defect": [(s, 0.0 if s < 10 else -1e-2) for s in steps]}, "mass"
        )
    )
    red, blue = places(picture, RED), places(picture, BLUE)
    assert np.ptp(red[0]) <= 4
    late = blue[0][blue[1] > np.median(red[1]) + 20]
    assert late.max() < np.median(red[0]) - 50


def test_the_same_data_give_the_same_bytes_and_names_keep_their_colours():
    data = {"gTopk": [(8, 1.0), (16, 2.0)], "mine": [(8, 3.0), (16, 1.0)]}
    assert figures.draw_bytes_per_rank(data, [(8, 1, 2), (16, 1, 2)]) == figures.draw_bytes_per_rank(
        data, [(8, 1, 2), (16, 1, 2)]
    )
    for names in (["TopkA", "Ok-Topk"], ["new", "Ok-Topk", "TopkA"]):
        picture = decode(figures.draw_selected({name: [(0, 1.0 + n), (10, 1.0 + n)] for n, name in enumerate(names)}))
        assert len(places(picture, RED, 40)[0]) > 200
        assert len(places(picture, ORANGE, 40)[0]) > 200


@pytest.mark.parametrize(
    ("text", "value", "words"),
    [
        (figures._bytes_text, 0, "0"),
        (figures._bytes_text, 999, "999 B"),
        (figures._bytes_text, 21_930_000, "21.9 MB"),
        (figures._bytes_text, 1e13, "10 TB"),
        (figures._bits_text, 2.21e9, "2.2 Gbit/s"),
        (figures._seconds_text, 1e-3, "1 ms"),
        (figures._seconds_text, 2e-5, "20 us"),
        (figures._seconds_text, 5000.0, "5000 s"),
    ],
)
def test_units(text, value, words):
    assert text(value) == words
