"""SUN360 on a tiny tree of its layout: photographs of one colour each, which say where they come from."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_plugins import SUN360
from lightning_plugins._support.errors import InputError
from tests.datamodules.resuming import UpFromMeans, check_that_it_goes_on, trainer

pytestmark = pytest.mark.adapter

SMALL = {"height": 32, "batch_size": 2}
# Red tells the split, green the photograph.
SPLITS = {"train": (50, 6), "val": (100, 2), "test": (150, 3)}


@pytest.fixture(scope="module")
def sun360(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "SUN360"
    for split, (red, count) in SPLITS.items():
        (root / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (192, 96), (red, 20 * number, 80)).save(root / split / f"{number:06}.jpg", quality=100)
    return root


def test_splits_are_those_of_the_folders(sun360):
    data = SUN360(sun360, **SMALL, tilts_per_image=2, augment=False)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader()), ("test", data.test_dataloader())):
        red, count = SPLITS[split]
        batches = list(loader)
        images, index = (torch.cat([batch[key] for batch in batches]) for key in ("image", "index"))
        assert sorted(index.tolist()) == list(range(2 * count))
        np.testing.assert_allclose(images[:, 0], red / 255, atol=2 / 255)
        for image, number in zip(images, index, strict=True):
            np.testing.assert_allclose(image[1], 20 * (int(number) // 2) / 255, atol=2 / 255)


def test_the_published_protocol_draws_whole_degrees(sun360):
    data = SUN360(sun360, **SMALL, evaluation_tilt="whole_degrees", tilts_per_image=20)
    up = torch.cat([batch["up"] for batch in data.test_dataloader()]).double()
    colatitudes = torch.rad2deg(torch.atan2(up[:, :2].norm(dim=1), up[:, 2]))
    torch.testing.assert_close(colatitudes, colatitudes.round(), rtol=0, atol=1e-4)
    assert colatitudes.max() > 150
    trained = torch.cat([batch["up"] for batch in data.train_dataloader()])
    assert trained[:, 2].min() > math.cos(math.radians(20)) - 1e-6


def test_it_trains_tests_and_goes_on(sun360, tmp_path):
    model = UpFromMeans()
    assert "error" in trainer(tmp_path).test(model, SUN360(sun360, **SMALL, tilt="sphere"), verbose=False)[0]
    check_that_it_goes_on(lambda: SUN360(sun360, **SMALL, tilt="sphere"), tmp_path)


def test_a_missing_split_is_refused_with_the_way_to_it(sun360, tmp_path):
    with pytest.raises(InputError, match=r"holds no folder 'train'; .*train/, val/ and test/ .* ask its authors"):
        trainer(tmp_path, max_epochs=1).fit(UpFromMeans(), SUN360(tmp_path))
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        SUN360(tmp_path).setup("test")
    (tmp_path / "test").rmdir()
    (tmp_path / "test").symlink_to(sun360 / "test")
    SUN360(tmp_path, **SMALL).setup("test")  # the others are not asked for


def test_repr_shows_the_effective_settings():
    assert repr(SUN360("data", 64, tilt="sphere")) == (
        "SUN360('data', height=64, batch_size=4, num_workers=0, tilt='sphere', evaluation_tilt='sphere', with_level=False, "
        "augment=True, tilts_per_image=1, seed=0)"
    )
