"""Oracle: block means in float64 of images whose size is a whole multiple; then a real Trainer that predicts."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_plugins import PanoramaFolder, PanoramicDepth
from lightning_plugins._lightning import LightningModule, Trainer
from lightning_plugins._support.errors import InputError

pytestmark = pytest.mark.adapter


class MeanColour(LightningModule):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def predict_step(self, batch, batch_idx):
        self.steps += 1
        return batch["index"], batch["path"], batch["image"].mean(dim=(2, 3)), batch["original_size"]


def predict(data, model=None):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return trainer.predict(model or MeanColour(), data)


def test_predicts_on_every_photograph_in_order(tmp_path):
    rng = np.random.default_rng(0)
    means = {}
    for name, rows in (("b.png", 64), ("a.png", 128), ("c.jpg", 32)):
        # Blocks of 8 x 8 in one colour: the mean over the sphere's grid stays what it is when the image is resized.
        blocks = rng.integers(40, 200, (rows // 8, rows // 4, 3), dtype=np.uint8)
        image = blocks.repeat(8, axis=0).repeat(8, axis=1)
        means[name] = image.mean(axis=(0, 1)) / 255
        Image.fromarray(image).save(tmp_path / name, quality=100, subsampling=0)
    batches = predict(PanoramaFolder(tmp_path, height=32, batch_size=2))
    assert [len(batch[0]) for batch in batches] == [2, 1]
    assert [path.rpartition("/")[2] for batch in batches for path in batch[1]] == ["a.png", "b.png", "c.jpg"]
    assert torch.cat([batch[0] for batch in batches]).tolist() == [0, 1, 2]
    assert torch.cat([batch[3] for batch in batches]).tolist() == [[128, 256], [64, 128], [32, 64]]
    colours = torch.cat([batch[2] for batch in batches]).numpy()
    for colour, name in zip(colours, sorted(means), strict=True):
        np.testing.assert_allclose(colour, means[name], atol=2 / 255)


def test_items_are_float_images_of_the_asked_size_and_one_file_is_a_folder_of_one(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "room.png")
    data = PanoramaFolder(tmp_path / "room.png", height=32)
    data.setup("predict")
    item = data.images[0]
    assert item["image"].dtype == torch.float32
    np.testing.assert_array_equal(item["image"].numpy(), image.transpose(2, 0, 1).astype(np.float32) / 255)
    assert PanoramaFolder(tmp_path, height=16).images[0]["image"].shape == (3, 16, 32)


def test_a_bad_image_among_good_ones_is_refused_before_anything_runs(tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    model = MeanColour()
    with pytest.raises(InputError, match=r"b\.png is 64 x 64 pixels \(1:1\)"):
        predict(PanoramaFolder(tmp_path, batch_size=1), model)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"b\.png cannot be decoded"):
        predict(PanoramaFolder(tmp_path, batch_size=1), model)
    assert model.steps == 0


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        predict(PanoramaFolder(tmp_path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"height": 1}, "got 1 and 2; leave width out"),
        ({"height": 64, "width": 100}, "twice as many columns, got 64 and 100"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
    ],
)
def test_options_are_validated_at_once(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PanoramaFolder("nowhere", **options)


def test_repr_shows_the_effective_settings():
    expected = "PanoramaFolder('rooms', height=64, width=128, batch_size=4, num_workers=0, recursive=False)"
    assert repr(PanoramaFolder("rooms", height=64)) == expected


@pytest.mark.parametrize(("columns", "rows"), [(2001, 1000), (200, 100), (128, 64)])
def test_the_model_sees_of_a_photograph_what_the_folder_gives(columns, rows, tmp_path):
    """A photograph of any size is the same input through the folder and through ``predict_panorama``."""
    photograph = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    Image.fromarray(photograph).save(tmp_path / "room.png")
    item = PanoramaFolder(tmp_path, height=64).images[0]["image"]
    torch.manual_seed(0)
    model = PanoramicDepth(backbone="test_resnet", widths=[8, 8, 8, 8, 8], sphere_widths=[], image_height=64).eval()
    seen = []
    model.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    depth_m = model.predict_panorama(torch.from_numpy(photograph).permute(2, 0, 1).float() / 255)
    assert depth_m.shape == (rows, columns)
    torch.testing.assert_close(seen[0][0], item, rtol=0, atol=1e-6)
