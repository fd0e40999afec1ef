"""One whole run of the recipe, which several test files look at and none changes."""

import numpy as np
import pytest
from PIL import Image

from tests.recipes.small_recipe import CALLBACKS, EPOCHS, SMALL, lightning, run_of


@pytest.fixture(scope="session")
def finished(ranks, tmp_path_factory):
    """A run that nothing disturbed, with callbacks of the user's own, on two photographs of one stem."""
    folder = tmp_path_factory.mktemp("runs")
    photographs = tmp_path_factory.mktemp("photographs")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    for name in ("attic.png", "attic.jpg"):
        Image.fromarray(pixels).save(photographs / name)
    words = ["run", "panoramic_depth", "--runs-dir", str(folder), *SMALL, *EPOCHS, *CALLBACKS, "--image", str(photographs)]
    assert ranks.run(lightning, 1, *words, timeout_s=120) == [0]
    return run_of(folder)
