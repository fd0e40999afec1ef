"""Oracle: OpenCV as the reader of the PNG bytes, and where the ink must be."""

import subprocess
import sys

import numpy as np
import pytest

from lightning_plugins.reporting.spectra import FLOOR, spectrum

cv2 = pytest.importorskip("cv2")

BLUE = (31, 119, 180)  # matplotlib's first colour, and its second
ORANGE = (255, 127, 14)
GRID = np.linspace(-1.0, 9.0, 400)


def peak(at, height=1.0):
    return height * np.exp(-0.5 * ((GRID - at) / 0.2) ** 2)


def where(png, colour):
    picture = cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)
    ink = (np.abs(picture - np.array(colour)) < 25).all(axis=-1)
    ink[:70, 600:] = False  # the legend
    return np.nonzero(ink)


def test_a_peak_stands_where_its_eigenvalue_is():
    _, left = where(spectrum(GRID, {"a": peak(0.0)}), BLUE)
    _, right = where(spectrum(GRID, {"a": peak(8.0)}), BLUE)
    assert left.mean() < 200
    assert right.mean() > 600


def test_the_axis_is_logarithmic():
    tops = [
        where(spectrum(GRID, {"big": peak(1.0), "small": peak(5.0, height)}), ORANGE)[0].min() for height in (0.1, 0.01, 0.001)
    ]
    steps = np.diff(tops)
    assert steps[0] > 20
    assert abs(steps[0] - steps[1]) <= 2  # a tenth is as far below, wherever it starts


def test_what_is_below_the_floor_is_not_drawn():
    assert len(where(spectrum(GRID, {"big": peak(1.0), "small": peak(5.0, 0.1 * FLOOR)}), ORANGE)[0]) == 0


def test_eigenvalues_are_marked_below():
    without = spectrum(GRID, {"a": peak(1.0)})
    rows, columns = where(spectrum(GRID, {"a": peak(1.0)}, eigenvalues=[7.0]), (0, 0, 0))
    marks = (columns > 500) & (columns < 760) & (rows > 200) & (rows < 355)
    none = where(without, (0, 0, 0))
    assert marks.sum() > ((none[1] > 500) & (none[1] < 760) & (none[0] > 200) & (none[0] < 355)).sum()


def test_pictures_are_reproducible():
    assert spectrum(GRID, {"a <b> $x$": peak(1.0)}, title="$x$") == spectrum(GRID, {"a <b> $x$": peak(1.0)}, title="$x$")


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        ({"a": [1.0, 2.0]}, r"a must have a value for each point of the grid, got shapes \(2,\) and \(400,\)"),
        ({"a": np.full(400, np.nan)}, "a must be finite, got 400 values that are not"),
        ({"a": np.zeros(400)}, "needs a density with a value above 0"),
        ({}, "needs a density with a value above 0"),
    ],
)
def test_bad_input_is_refused(densities, message):
    with pytest.raises(ValueError, match=message):
        spectrum(GRID, densities)


def test_pyplot_and_torch_stay_out():
    code = (
        "import sys; from lightning_plugins.reporting.spectra import spectrum\n"
        "spectrum([0.0, 1.0], {'a': [1.0, 2.0]})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
