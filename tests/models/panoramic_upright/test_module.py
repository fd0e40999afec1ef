"""The upright network inside a real Trainer: with one optimizer, with two by hand, with none of the training's parts left."""

import copy

import pytest
import torch

from lightning_plugins import PanoramicUpright, RenderedRooms
from lightning_plugins._lightning import Callback, Trainer, built_for, seed_everything
from lightning_plugins.engines.sphere import rotation_from_up
from lightning_plugins.models.checkpoint import load_module
from lightning_plugins.models.panoramic_upright.lookup_table import AnalyticLookupTable
from lightning_plugins.models.panoramic_upright.orientation import expected_error_deg, von_mises_fisher_loss
from lightning_plugins.models.panoramic_upright.reconstruction_losses import (
    adversarial_loss,
    discriminator_loss,
    edge_loss,
    reconstruction_l1,
)
from tests.models.panoramic_upright.test_reconstruction import awake
from tests.models.panoramic_upright.tilted_rooms import tiny_rooms, up_vectors

pytestmark = pytest.mark.adapter

TINY = {"widths": [8, 12], "blocks": 1, "image_height": 32}
KINDS = {
    "orientation alone": {},
    "with a discriminator": {"reconstruct": True, "adversarial_weight": 0.1},
    "without one, learned table": {"reconstruct": True, "adversarial_weight": 0.0, "lookup_table": "learned"},
}


def upright(**options):
    seed_everything(0, verbose=False)
    return PanoramicUpright(**{**TINY, **options})


def trainer(folder, **options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", **{**defaults, **options})


class Watch(Callback):
    """Of each batch its loss, the learning rates that its steps used and how many were taken by then."""

    def __init__(self):
        self.losses, self.rates, self.steps = [], [], []
        self.used = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.used += [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.rates.append(self.used)
        self.used = []
        self.steps.append(trainer.global_step)


class Gradients(Callback):
    """The first batch, and the gradients that each optimizer's steps used, by name."""

    def __init__(self):
        self.batch, self.steps = None, []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self.keep)
        self.names = {parameter: name for name, parameter in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = self.batch or batch

    def keep(self, optimizer, args, kwargs):
        used = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.steps.append({self.names[parameter]: parameter.grad.clone() for parameter in used})


class FrozenBatchStatistics(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for part in pl_module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.eval()


class SaveAfter(Callback):
    """Save a checkpoint after a batch; never stop the training."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batch -= 1
        if self.batch == 0:
            trainer.save_checkpoint(self.path)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module, before):
    """Names of the parts of which a weight has changed."""
    parts = ("network.orientation", "network.table", "network.reconstruction", "discriminator")
    after = module.state_dict()
    return {part for part in parts for name in after if name.startswith(part) and not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_learns(kind, tmp_path):
    module, watch = upright(**KINDS[kind]), Watch()
    before = weights(module)
    trainer(tmp_path, max_epochs=6, limit_val_batches=0, callbacks=[watch]).fit(module, tiny_rooms(augment=False))
    expected = {
        "orientation alone": {"network.orientation"},
        "with a discriminator": {"network.orientation", "network.reconstruction", "discriminator"},
        "without one, learned table": {"network.orientation", "network.reconstruction", "network.table"},
    }
    assert moved(module, before) == expected[kind]
    assert sum(watch.losses[-4:]) < sum(watch.losses[:4])
    assert all(parameter.requires_grad for parameter in module.parameters()), "a toggled optimizer was not toggled back"


def test_a_learned_table_stays_right_while_it_learns(tmp_path):
    module = upright(reconstruct=True, adversarial_weight=0.0, lookup_table="learned")
    exact, up = AnalyticLookupTable(32, 64), up_vectors(range(40), max_tilt_deg=180.0)

    @torch.no_grad()
    def error_deg():
        return float(torch.rad2deg((module.network.table(up) - exact(up)).norm(dim=-1).mean()))

    before = error_deg()
    trainer(tmp_path, max_epochs=5, limit_val_batches=0).fit(module, tiny_rooms())
    assert before != error_deg() < 1.02 * before


def test_trains_in_mixed_precision(tmp_path):
    module, watch = upright(**KINDS["with a discriminator"]), Watch()
    trainer(tmp_path, max_epochs=3, precision="bf16-mixed", callbacks=[watch]).fit(module, tiny_rooms(augment=False))
    assert sum(watch.losses[-2:]) < sum(watch.losses[:2])


def test_batches_without_what_is_learned_from_are_refused_by_name(tmp_path):
    rooms = tiny_rooms()
    rooms.gives_level = False
    with pytest.raises(ValueError, match="the batches hold image, up, and no level; give the datamodule with_level=True"):
        trainer(tmp_path, max_epochs=1).fit(upright(reconstruct=True), rooms)
    with pytest.raises(
        ValueError, match="the batches hold image, depth, mask, index, and no up; give the datamodule tilt='small'"
    ):
        trainer(tmp_path, max_epochs=1).fit(upright(), RenderedRooms(train_rooms=4, val_rooms=2, height=32))


def test_figures_of_the_test_rooms(tmp_path):
    rooms, module = RenderedRooms(test_rooms=3, height=32, batch_size=2, tilt="small"), upright().eval()
    (figures,) = trainer(tmp_path).test(module, rooms, verbose=False)
    errors = []
    for batch in rooms.evaluation_dataloader():
        found = torch.nn.functional.normalize(module(batch["image"]).double(), dim=-1)
        errors += torch.rad2deg(torch.acos((found * batch["up"].double()).sum(-1))).tolist()
    assert figures["panoramic_upright/test_mean_deg"] == pytest.approx(sum(errors) / 3, abs=1e-3)


def test_half_precision_sees_what_single_precision_sees():
    module = upright().eval()
    image = torch.rand(1, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    exact = module.network.orientation.histograms(image)
    for dtype in (torch.bfloat16, torch.float16):
        found = module.network.orientation.histograms.to(dtype)(image.to(dtype))
        assert (found.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": 3, "max_steps": 4}, {"max_steps": 8}], ids=str)
def test_the_schedule_ends_with_the_training(kind, limit, tmp_path):
    module, watch = upright(**KINDS[kind]), Watch()
    trainer(tmp_path, limit_val_batches=0, callbacks=[watch], **limit).fit(module, tiny_rooms(train_rooms=12))
    optimizers = 2 if kind == "with a discriminator" else 1
    batches = min(limit.get("max_steps", 1000) // optimizers, 3 * limit.get("max_epochs", 1000))
    assert watch.steps == [optimizers * (batch + 1) for batch in range(batches)]
    for rates in zip(*watch.rates, strict=True):
        assert rates[-1] < 1e-3 * max(rates)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_step_once(accumulate, tmp_path):
    module, watch = upright(**KINDS["with a discriminator"], accumulate_batches=accumulate), Watch()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[watch]).fit(module, tiny_rooms(train_rooms=16))
    # Four batches an epoch; the last step of one takes what is left.
    assert watch.steps == {2: [0, 2, 2, 4, 4, 6, 6, 8], 3: [0, 0, 2, 4, 4, 4, 6, 8]}[accumulate]
    assert max(watch.rates[-1]) < 1e-3 * 0.002


def test_each_optimizer_follows_its_own_loss(tmp_path):
    """The gradients of the first steps, worked out from the losses: none of the other loss, which is as large, is among them."""
    module = upright(reconstruct=True, adversarial_weight=2.0, edge_weight=0.7)
    awake(module.network.reconstruction).train()
    start, gradients = copy.deepcopy(module), Gradients()
    trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[gradients]).fit(module, tiny_rooms())
    image, up, level = (gradients.batch[name] for name in ("image", "up", "level"))
    discriminator, network = start.discriminator, start.network
    _, refined = network.reconstruction(image, AnalyticLookupTable(32, 64)(up))
    loss = von_mises_fisher_loss(network.orientation(image), up) + reconstruction_l1(refined, level)
    loss = loss + 0.7 * edge_loss(refined, level) + 2.0 * adversarial_loss(discriminator(refined))
    rival = discriminator_loss(discriminator(level), discriminator(refined.detach()))
    for found, expected, part in zip(gradients.steps, (loss, rival), ("network.", "discriminator."), strict=True):
        named = {name: parameter for name, parameter in start.named_parameters() if name.startswith(part)}
        exact = torch.autograd.grad(expected, [*named.values()], retain_graph=True)
        assert found.keys() == named.keys()
        for name, gradient in zip(named, exact, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=f"{name} differs")


def test_accumulated_batches_are_averaged(tmp_path):
    """Two batches of two rooms give the gradient of one of four: without a batch norm's statistics, which differ."""
    found = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        module, gradients = upright(**KINDS["with a discriminator"], accumulate_batches=accumulate), Gradients()
        rooms = tiny_rooms(train_rooms=4, batch_size=batch_size)
        callbacks = [FrozenBatchStatistics(), gradients]
        trainer(tmp_path, max_epochs=1, limit_val_batches=0, precision="64-true", callbacks=callbacks).fit(module, rooms)
        found.append(gradients.steps)
    assert len(found[0]) == len(found[1]) == 2
    for one, other in zip(*found, strict=True):
        assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-9) for name in one)


def test_gradients_are_clipped_by_hand(tmp_path):
    module, gradients = upright(**KINDS["with a discriminator"], gradient_clip_norm=0.01), Gradients()
    trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[gradients]).fit(module, tiny_rooms())
    norms = [float(torch.stack([gradient.norm() for gradient in step.values()]).norm()) for step in gradients.steps]
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_with_one_optimizer_the_trainer_clips_and_accumulates(tmp_path):
    module, watch = upright(), Watch()
    options = {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}
    trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[watch], **options).fit(module, tiny_rooms(train_rooms=16))
    assert watch.steps[-1] == 4
    assert max(watch.rates[-1]) < 1e-3 * 0.002


@pytest.mark.parametrize(
    ("kind", "batch"), [*((kind, 3) for kind in KINDS), *(("with a discriminator", batch) for batch in (2, 5))]
)
def test_resumes_bit_equal_from_a_mid_run_checkpoint(kind, batch, tmp_path):
    whole, rest = Watch(), Watch()
    saved = tmp_path / "mid.ckpt"
    first = upright(**KINDS[kind])
    trainer(tmp_path, max_epochs=3, callbacks=[whole, SaveAfter(batch, saved)]).fit(first, tiny_rooms())
    second = PanoramicUpright(**TINY, **KINDS[kind])  # other weights: they must come from the file
    trainer(tmp_path, max_epochs=3, callbacks=[rest]).fit(second, tiny_rooms(), ckpt_path=saved)
    assert len(whole.losses) == 6
    assert rest.losses == whole.losses[batch:]
    assert rest.rates == whole.rates[batch:]
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_the_deployed_file_holds_no_discriminator(tmp_path):
    module = upright(**KINDS["with a discriminator"])
    fitted = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    fitted.fit(module, tiny_rooms())
    fitted.save_checkpoint(tmp_path / "training.ckpt")
    module.deploy(tmp_path / "deployed.ckpt")
    training = torch.load(tmp_path / "training.ckpt", weights_only=True)["state_dict"]
    deployed = torch.load(tmp_path / "deployed.ckpt", weights_only=True)
    assert [name for name in training if name.startswith("discriminator.")]
    assert {name.split(".")[0] for name in deployed["state_dict"]} == {"network"}
    assert set(deployed) == {"state_dict", "hyper_parameters", "pytorch-lightning_version"}
    image = torch.rand(2, 3, 32, 64)
    for loaded in (
        PanoramicUpright.load_from_checkpoint(tmp_path / "deployed.ckpt").eval(),
        load_module(PanoramicUpright, tmp_path / "deployed.ckpt"),
        load_module(PanoramicUpright, tmp_path / "training.ckpt"),
    ):
        for one, other in zip(loaded.network(image), module.eval().network(image), strict=True):
            torch.testing.assert_close(one, other)


def test_predicts_batches(tmp_path):
    module = upright().eval()
    image = torch.rand(3, 3, 32, 64)
    (found,) = trainer(tmp_path).predict(module, torch.utils.data.DataLoader([{"image": one} for one in image], batch_size=3))
    with torch.no_grad():
        vector = module(image)
    torch.testing.assert_close(found["up"] * vector.norm(dim=-1, keepdim=True), vector)
    torch.testing.assert_close(found["expected_error_deg"], expected_error_deg(vector))
    torch.testing.assert_close(torch.einsum("bij,bj->bi", found["rotation"], found["up"]), torch.tensor([[0.0, 0, 1]] * 3))


def test_predicts_and_levels_photographs_of_any_size():
    module = upright(reconstruct=True, max_expected_error_deg=180.0)
    before = weights(module)
    photograph = torch.rand(3, 50, 100)
    estimate = module.predict_up(photograph)
    level = module.level_panorama(photograph)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "it learned from a photograph"
    assert estimate.is_sure
    assert estimate.up.norm().item() == pytest.approx(1)
    assert level.shape == (3, 50, 100)
    assert module.level_panorama(photograph, height=20).shape == (3, 20, 40)
    # The refiner of a new model leaves plain resampling.
    zenith = torch.einsum("ij,j->i", rotation_from_up(estimate.up), estimate.up)
    torch.testing.assert_close(zenith, torch.tensor([0.0, 0.0, 1.0]))
    assert (level - photograph).abs().max() > 0.1


def test_an_unsure_estimate_leaves_the_photograph_alone():
    photograph = torch.rand(3, 50, 100)
    module = upright(max_expected_error_deg=1e-3)
    estimate = module.predict_up(photograph)
    assert not estimate.is_sure
    assert estimate.expected_error_deg > 1e-3
    assert torch.equal(module.level_panorama(photograph), photograph)
    # Also where the model would have resized it or changed its precision.
    nearly = torch.rand(3, 200, 401, dtype=torch.float64)
    assert torch.equal(module.level_panorama(nearly), nearly)
    assert module.level_panorama(nearly, height=20).shape == (3, 20, 40)


@pytest.mark.parametrize("colour", [0.0, 0.5, 1.0])
def test_a_photograph_of_one_colour_has_no_cue(colour):
    photograph = torch.full((3, 50, 100), colour)
    module = upright()
    estimate = module.predict_up(photograph)
    assert estimate.up.tolist() == [0, 0, 1]
    assert estimate.expected_error_deg == pytest.approx(90, abs=0.1)
    assert not estimate.is_sure
    assert torch.equal(module.level_panorama(photograph), photograph)


@pytest.mark.parametrize("image", [torch.rand(3, 64, 64), torch.rand(1, 64, 128), torch.zeros(3, 64, 128, dtype=torch.uint8)])
def test_other_images_are_refused(image):
    for use in (upright().predict_up, upright().level_panorama):
        with pytest.raises(ValueError, match=r"image must be \(3, H, 2 H\) of floats in \[0, 1\], got"):
            use(image)


def test_a_schedule_without_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a number of steps, and this Trainer has inf; give max_epochs"):
        trainer(tmp_path, max_epochs=-1, limit_val_batches=0).fit(upright(), tiny_rooms())


def test_repr_says_which_lightning_it_was_built_for():
    assert built_for() in repr(upright())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learning_rate": 0}, "learning_rate must be greater than 0, got 0"),
        ({"reconstruction_learning_rate": -1}, "reconstruction_learning_rate must be greater than 0, got -1"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more, got -1"),
        ({"edge_weight": -1}, "edge_weight must be 0 or more, got -1; 0 leaves the edges out"),
        ({"adversarial_weight": -1}, "adversarial_weight must be 0 or more, got -1"),
        ({"refine_steps": -1}, "refine_steps must be 0 or more, got -1"),
        ({"max_expected_error_deg": 0}, r"max_expected_error_deg must be in \(0, 180\], got 0"),
        ({"lookup_table": "learnt"}, "lookup_table has no 'learnt'; did you mean learned"),
        ({"widths": []}, "widths must be positive"),
        ({"image_height": 30}, "image_height must be a multiple of 16 with 2 widths, got 30"),
        ({"image_height": 0}, "image_height must be a multiple of 16 with 2 widths, got 0"),
        ({"reconstruct": True, "accumulate_batches": 0}, "accumulate_batches must be 1 or more, got 0"),
        ({"reconstruct": True, "gradient_clip_norm": 0}, "gradient_clip_norm must be greater than 0, got 0; None does not clip"),
        ({"accumulate_batches": 2}, r"got 2 and None without; give Trainer\(accumulate_grad_batches"),
        ({"gradient_clip_norm": 1.0}, r"got 1 and 1.0 without; give Trainer\(accumulate_grad_batches"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PanoramicUpright(**{**TINY, **options})
