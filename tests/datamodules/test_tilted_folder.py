"""Photographs under tilts. Oracle: panoramas whose colour is a closed form of direction, and so every view of them too."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_plugins import PanoramaFolder
from lightning_plugins._support.errors import InputError
from tests.datamodules.resuming import UpFromMeans, check_that_it_goes_on, trainer

pytestmark = pytest.mark.adapter

TILTED = {"height": 32, "batch_size": 2, "tilt": "small"}


def directions(height):
    colatitude = math.pi * (np.arange(height)[:, None] + 0.5) / height
    longitude = 2 * math.pi * ((np.arange(2 * height) + 0.5) / (2 * height) - 0.5)
    x, y = np.sin(colatitude) * np.cos(longitude), -np.sin(colatitude) * np.sin(longitude)
    return np.stack([x, y, np.broadcast_to(np.cos(colatitude), x.shape)], axis=2)


def scene(seen, number):
    """Colour ``(..., 3)`` in [0, 1] of level directions ``(..., 3)``: the third channel is the height above the horizon."""
    x, y, z = np.moveaxis(seen, -1, 0)
    return np.stack([0.5 + 0.3 * x * z + 0.1 * y, 0.5 + 0.4 * x * y, 0.5 + 0.4 * z], axis=-1) - 0.01 * number


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Eight photographs of different sizes and brightness."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        colours = np.rint(255 * scene(directions(96 + 16 * number), number)).astype(np.uint8)
        Image.fromarray(colours).save(folder / f"{number}.png")
    return folder


def items(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [{key: value[i] for key, value in batch.items()} for batch in loader for i in range(len(batch["index"]))]


def level_from_camera(up):
    """Rodrigues' formula of the rotation that takes up to the vertical along the shortest way."""
    x, y, z = up.double().numpy()
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + z)


@pytest.mark.parametrize("tilt", ["small", "hand_held", "sphere", "cone:60"])
def test_image_and_level_are_what_the_scene_looks_like_from_up(tilt, photographs):
    data = PanoramaFolder(photographs, **TILTED | {"tilt": tilt}, with_level=True, val_share=0, test_share=1, tilts_per_image=3)
    found = items(data.test_dataloader())
    assert [int(item["index"]) for item in found] == list(range(24))
    for item in found:
        number = int(item["index"]) // 3
        tilted = scene(directions(32) @ level_from_camera(item["up"]).T, number).transpose(2, 0, 1)
        np.testing.assert_allclose(item["image"].numpy(), tilted, atol=0.012)
        np.testing.assert_allclose(item["level"].numpy(), scene(directions(32), number).transpose(2, 0, 1), atol=0.012)
    assert len({tuple(item["up"].tolist()) for item in found}) == 24


def test_training_views_keep_image_level_and_up_together(photographs):
    data = PanoramaFolder(photographs, **TILTED, with_level=True, tilts_per_image=2)
    for item in items(data.train_dataloader(), 5):
        height = directions(32) @ item["up"].double().numpy()
        # The colours vary, but the blue channel still rises with the height above the horizon.
        blue = item["image"][2].numpy()
        free = blue < 1
        assert np.corrcoef(np.argsort(np.argsort(blue[free])), np.argsort(np.argsort(height[free])))[0, 1] > 0.99
        level = item["level"].numpy()
        x, y, z = np.moveaxis(directions(32) @ level_from_camera(item["up"]), -1, 0)
        row, column = (
            np.clip(np.arccos(z) / math.pi * 32, 0, 31).astype(int),
            (np.arctan2(-y, x) / math.pi * 32 + 32).astype(int) % 64,
        )
        assert np.abs(item["image"].numpy()[:, row, column] - level).mean() < 0.02


def test_no_photograph_is_in_two_splits_and_none_is_lost(photographs):
    data = PanoramaFolder(photographs, **TILTED, val_share=0.25, test_share=0.25)
    paths = [data.split_paths(split) for split in ("train", "val", "test")]
    assert [len(split) for split in paths] == [4, 2, 2]
    assert sorted(path for split in paths for path in split) == sorted(photographs.iterdir())
    assert paths == [
        PanoramaFolder(photographs, **TILTED, val_share=0.25, test_share=0.25).split_paths(s) for s in ("train", "val", "test")
    ]
    assert paths[0] != PanoramaFolder(photographs, **TILTED, val_share=0.25, test_share=0.25, seed=1).split_paths("train")


def test_training_changes_with_the_epoch_and_validation_does_not(photographs):
    data = PanoramaFolder(photographs, **TILTED, tilts_per_image=2)
    heights = [item["up"][2] for epoch in (0, 1) for item in items(data.train_dataloader(), epoch)]
    assert torch.stack(heights).sort().values.diff().min() > 0
    first, second = items(data.val_dataloader(), 0), items(data.val_dataloader(), 1)
    assert len(first) == 2
    assert all(torch.equal(ours[key], theirs[key]) for ours, theirs in zip(first, second, strict=True) for key in ours)


def test_workers_turn_the_same(photographs):
    alone, helped = (items(PanoramaFolder(photographs, **TILTED, num_workers=n).train_dataloader(), 1) for n in (0, 2))
    for ours, theirs in zip(alone, helped, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def sharpness(image):
    """Mean square of the second differences along rows and columns between 45 degrees up and down."""
    middle = image.double().numpy()[:, image.shape[1] // 4 : -image.shape[1] // 4]
    return np.square(np.diff(middle, 2, axis=1)).mean() + np.square(np.diff(middle, 2, axis=2)).mean()


def test_level_images_are_as_blurred_as_tilted_ones(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    options = {"height": 64, "with_level": True, "val_share": 0, "test_share": 1, "tilts_per_image": 8}
    found = items(PanoramaFolder(tmp_path, tilt="cone:6", **options).test_dataloader())
    ratios = [sharpness(item["level"]) / sharpness(item["image"]) for item in found]
    # Read from the photograph itself instead of from a turned one, the level image has 17 % more.
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


def test_small_photographs_are_told_of(tmp_path, photographs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PanoramaFolder(photographs, **TILTED).photographs("train")
    for name in "abc":
        Image.new("RGB", (64, 32)).save(tmp_path / f"{name}.png")
    with pytest.warns(UserWarning, match="1 of 1 train photographs have fewer than 64 rows"):
        PanoramaFolder(tmp_path, height=64, tilt="small").photographs("train")


def test_it_trains_validates_and_tests(photographs, tmp_path):
    data = PanoramaFolder(photographs, **TILTED, evaluation_tilt="sphere", tilts_per_image=2)
    fitted, model = trainer(tmp_path, max_epochs=2), UpFromMeans()
    fitted.fit(model, data)
    assert len(model.shown) == 12
    assert "error" in fitted.callback_metrics
    assert "error" in fitted.test(model, data, verbose=False)[0]
    assert min(float(item["up"][2]) for item in items(data.test_dataloader()) + items(data.val_dataloader())) < 0.9
    model = UpFromMeans()
    trainer(tmp_path, max_epochs=1).fit(model, PanoramaFolder(photographs, **TILTED, val_share=0))
    assert len(model.shown) == 4


def test_a_run_goes_on_in_the_middle_of_an_epoch(photographs, tmp_path):
    check_that_it_goes_on(lambda: PanoramaFolder(photographs, **TILTED, with_level=True), tmp_path)


def test_without_a_tilt_training_is_refused(photographs, tmp_path):
    with pytest.raises(InputError, match="is for predicting: training, validation and test need a tilt; give tilt='small'"):
        trainer(tmp_path, max_epochs=1).fit(UpFromMeans(), PanoramaFolder(photographs))


def test_a_split_without_photographs_is_refused(tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "one.png")
    with pytest.raises(
        InputError, match=r"of the 1 photographs in .* none is left for train: val_share 0.1 and test_share 0.1 take 1"
    ):
        PanoramaFolder(tmp_path, **TILTED).setup("fit")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tilt": "tiny"}, "there are no tilts 'tiny'"),
        ({"tilt": "small", "evaluation_tilt": "tiny"}, "there are no tilts 'tiny'"),
        ({"with_level": True}, "need a tilt, got none"),
        ({"evaluation_tilt": "small"}, "need a tilt, got none"),
        ({"tilt": "small", "tilts_per_image": 0}, "tilts_per_image must be 1 or more, got 0"),
        ({"tilt": "small", "val_share": 0.6, "test_share": 0.6}, "1 or less together, got 0.6 and 0.6"),
        ({"tilt": "small", "val_share": float("nan")}, "1 or less together, got nan"),
        ({"tilt": "small", "seed": -1}, "seed must be from 0"),
    ],
)
def test_options_are_validated_at_once(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PanoramaFolder("nowhere", **options)


def test_repr_shows_the_effective_settings_and_printing_reads_no_photograph():
    data = PanoramaFolder("rooms", 64, tilt="small")
    assert str(data) == repr(data)
    assert repr(data).endswith(
        "tilt='small', evaluation_tilt='small', with_level=False, augment=True, tilts_per_image=1, val_share=0.1, "
        "test_share=0.1, seed=0)"
    )
