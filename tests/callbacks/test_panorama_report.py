"""The callback inside a real Trainer, under whichever Lightning the environment variable names. Oracle of the pictures' data:
a model whose prediction is known in closed form, twice the truth."""

import builtins
import errno
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_plugins import PanoramaReport
from lightning_plugins._lightning import CSVLogger, LightningModule, Logger, Trainer
from lightning_plugins._support.errors import InputError

pytestmark = pytest.mark.adapter

PICTURE = "epoch_000_sample_0.png"


class TwiceTheTruth(LightningModule):
    """Predicts the truth times a weight, which starts at 2 and does not move."""

    def __init__(self, crash_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.crash_at = crash_at

    def training_step(self, batch, batch_idx):
        if self.crash_at == self.current_epoch:
            raise RuntimeError("crash")
        loss = self.weight * 0
        self.log("train/loss", loss + 1)
        return loss

    def validation_step(self, batch, batch_idx):
        prediction = batch["depth"] * self.weight
        self.log("val/abs_rel", (prediction / batch["depth"] - 1).abs().mean())
        return {**batch, "prediction": prediction}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class ReturnsNothing(TwiceTheTruth):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


class WandbLogger(Logger):
    """Stands in for the logger of that name, and keeps what it is given."""

    name = version = "fake"

    def __init__(self):
        super().__init__()
        self.images = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, *args, **kwargs):
        pass

    def log_image(self, key, images, step=None):
        self.images.append((key, [Path(image).name for image in images], step))


def rooms(count=6, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        [
            {
                "image": torch.rand(3, 8, 16, generator=generator),
                "depth": torch.rand(1, 8, 16, generator=generator) + 1,
                "mask": torch.ones(1, 8, 16, dtype=torch.bool),
            }
            for _ in range(count)
        ],
        batch_size=batch_size,
    )


def trainer_of(folder, report, epochs=2, logger=False, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    options = {**quiet, **options, "max_epochs": epochs, "logger": logger}
    return Trainer(default_root_dir=str(folder), accelerator="cpu", callbacks=[report], **options)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_previews_after_each_validation_and_a_report_at_the_end(tmp_path):
    report = PanoramaReport(samples=3)
    trainer_of(tmp_path, report).fit(TwiceTheTruth(), rooms(), rooms())
    previews = [f"previews/epoch_{epoch:03d}_sample_{sample}.png" for epoch in (0, 1) for sample in (0, 1, 2)]
    assert files_in(tmp_path) == [*previews, "report.html"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "TwiceTheTruth after 2 epochs and 6 optimizer steps." in page
    # The prediction is twice the truth: each sample's relative error is 1 exactly.
    assert page.count('<td class="number">1</td>') >= 3
    assert "val/abs_rel" in page


def test_curves_come_from_the_csv_logger(tmp_path):
    report = PanoramaReport(samples=1)
    trainer_of(tmp_path, report, logger=CSVLogger(tmp_path / "logs")).fit(TwiceTheTruth(), rooms(), rooms())
    page = (tmp_path / "report.html").read_text()
    assert "Losses and errors against steps." in page
    assert page.count("data:image/png;base64,") == 2


def test_the_sanity_check_writes_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        trainer_of(tmp_path, PanoramaReport()).fit(TwiceTheTruth(crash_at=0), rooms(), rooms())
    assert files_in(tmp_path) == []


def test_a_crash_leaves_no_state_and_keeps_what_was_written(tmp_path):
    report = PanoramaReport(samples=1)
    before = dict(vars(report))
    with pytest.raises(RuntimeError, match="crash"):
        trainer_of(tmp_path, report).fit(TwiceTheTruth(crash_at=1), rooms(), rooms())
    assert {name: vars(report)[name] for name in before} == before
    assert files_in(tmp_path) == ["previews/epoch_000_sample_0.png"]


def test_a_bare_validate_writes_the_report(tmp_path):
    report = PanoramaReport(samples=1, every_n_epochs=5, folder=tmp_path / "elsewhere")
    trainer_of(tmp_path, report).validate(TwiceTheTruth(), rooms(), verbose=False)
    assert files_in(tmp_path) == ["elsewhere/previews/epoch_000_sample_0.png", "elsewhere/report.html"]


def test_draws_every_nth_epoch(tmp_path):
    report = PanoramaReport(samples=1, every_n_epochs=2)
    trainer_of(tmp_path, report, epochs=5).fit(TwiceTheTruth(), rooms(), rooms())
    assert files_in(tmp_path / "previews") == ["epoch_001_sample_0.png", "epoch_003_sample_0.png"]


def test_predict_serves_a_module_that_returns_nothing(tmp_path):
    def predict(module, batch):
        return {**batch, "prediction": batch["depth"] * module.weight}

    trainer_of(tmp_path, PanoramaReport(samples=1, predict=predict), epochs=1).fit(ReturnsNothing(), rooms(), rooms())
    other = tmp_path / "other"
    trainer_of(other, PanoramaReport(samples=1), epochs=1).fit(TwiceTheTruth(), rooms(), rooms())
    assert (tmp_path / "previews" / PICTURE).read_bytes() == (other / "previews" / PICTURE).read_bytes()


def test_another_validation_step_is_refused_before_the_training(tmp_path):
    model = ReturnsNothing(crash_at=0)
    with pytest.raises(InputError, match=r"validation_step of ReturnsNothing, got NoneType; .* PanoramaReport\(predict=f\)"):
        trainer_of(tmp_path, PanoramaReport()).fit(model, rooms(), rooms())
    with pytest.raises(InputError, match=r"from the function given as predict, got int"):
        trainer_of(tmp_path, PanoramaReport(predict=lambda module, batch: 3)).fit(model, rooms(), rooms())


@pytest.mark.parametrize(
    ("upload", "expected"), [(True, [("panorama_report/preview", ["epoch_000_sample_0.png"], 3)]), (False, [])]
)
def test_previews_go_to_wandb_unless_told_otherwise(tmp_path, upload, expected):
    logger = WandbLogger()
    report = PanoramaReport(samples=1, upload_images=upload)
    trainer_of(tmp_path, report, epochs=1, logger=logger).fit(TwiceTheTruth(), rooms(), rooms())
    assert logger.images == expected


def test_without_validation_data_it_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"saw no validation panorama, so report\.html has no samples"):
        trainer_of(tmp_path, PanoramaReport(), epochs=1, limit_val_batches=0).fit(TwiceTheTruth(), rooms(), rooms())
    assert files_in(tmp_path) == ["report.html"]


def test_training_is_the_same_with_and_without_it(tmp_path):
    states = []
    for report in (PanoramaReport(samples=2), PanoramaReport(samples=0)):
        torch.manual_seed(0)
        trainer_of(tmp_path, report).fit(TwiceTheTruth(), rooms(), rooms())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_folder_that_cannot_be_made_is_refused_before_the_training(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"taken/previews cannot be made \(.*\); .* PanoramaReport\(folder="):
        trainer_of(tmp_path, PanoramaReport(folder=tmp_path / "taken")).fit(TwiceTheTruth(crash_at=0), rooms(), rooms())


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"epoch_000_sample_0\.png cannot be written \(No space left on device\)"):
        trainer_of(tmp_path, PanoramaReport()).fit(TwiceTheTruth(), rooms(), rooms())
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples": -1}, "samples must be 0 or more, got -1"),
        ({"near_m": 3.0, "far_m": 3.0}, r"0 <= near_m < far_m, got 3\.0 and 3\.0"),
        ({"near_m": -1.0}, r"got -1\.0 and 10\.0; rooms fit 0 to 10"),
        ({"every_n_epochs": 0}, "every_n_epochs must be 1 or more, got 0"),
        ({"predict": "f"}, "predict must be a function of the module and the batch, got str"),
    ],
)
def test_options_are_validated_at_once(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PanoramaReport(**options)


def test_repr_shows_the_settings_and_tells_instances_apart():
    report = PanoramaReport(samples=2, folder="here", predict=builtins.dict)
    assert repr(report) == (
        "PanoramaReport(samples=2, near_m=0.0, far_m=10.0, every_n_epochs=1, folder='here', predict=dict, upload_images=True)"
    )
    assert report.state_key != PanoramaReport().state_key
    assert report.state_dict() == {}
