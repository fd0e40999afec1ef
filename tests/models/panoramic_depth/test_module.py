"""Teacher and student inside a real Trainer: both act, resume is bit-equal, the deployed file holds the student alone."""

import pytest
import torch

from lightning_plugins import DepthTeacher, PanoramicDepth, RenderedRooms
from lightning_plugins._lightning import Callback, Trainer, built_for, seed_everything
from lightning_plugins.models.checkpoint import load_module

pytestmark = pytest.mark.adapter

TINY = {"backbone": "test_resnet", "widths": [8, 8, 8, 16, 16], "sphere_widths": [8, 8, 8]}


def tiny_rooms(**options):
    return RenderedRooms(
        **{"train_rooms": 8, "val_rooms": 2, "test_rooms": 2, "height": 32, "batch_size": 4, "seed": 3, **options}
    )


def trainer(folder, **options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", **{**defaults, **options})


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


class SaveAfter(Callback):
    """Save a checkpoint after a step; never stop the training."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    seed_everything(0, verbose=False)
    teacher = DepthTeacher(widths=TINY["widths"])
    trainer(folder, max_epochs=1, limit_val_batches=0).fit(teacher, tiny_rooms())
    teacher.deploy(folder / "teacher.ckpt")
    return folder / "teacher.ckpt"


def student(teacher_file, **options):
    seed_everything(0, verbose=False)
    return PanoramicDepth(**TINY, teacher=str(teacher_file) if teacher_file else None, **options)


def gradients(module, folder):
    """The gradients of one step, by name; nothing is updated."""
    kept = {}

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            kept.update({name: p.grad.clone() for name, p in pl_module.network.named_parameters() if p.grad is not None})

    trainer(folder, max_steps=1, limit_val_batches=0, callbacks=[Keep()]).fit(module, tiny_rooms())
    return kept


def differ(a, b):
    return [name for name in a if name in b and not torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-7)]


def test_teacher_and_sphere_branch_act(teacher_file, tmp_path):
    # The decoder starts alike in all three, so that only what is taken away differs.
    both = gradients(student(teacher_file, decoder_from_teacher=False), tmp_path)
    untaught = gradients(student(teacher_file, decoder_from_teacher=False, distillation_weight=0.0), tmp_path)
    flat = student(teacher_file, decoder_from_teacher=False)
    with torch.no_grad():
        for parameter in flat.network.sphere_branch.norms.parameters():
            parameter.zero_()  # a sphere branch that says nothing
    without_sphere = gradients(flat, tmp_path)
    assert set(both) == set(untaught)
    assert [n for n in differ(both, untaught) if n.startswith("grid_branch")]
    assert [n for n in differ(both, without_sphere) if n.startswith("grid_branch")]


@pytest.mark.parametrize("distance", ["l1", "cosine", "affinity"])
def test_every_distance_trains(distance, teacher_file, tmp_path):
    losses = Losses()
    module = student(teacher_file, distance=distance)
    trainer(tmp_path, max_epochs=6, limit_val_batches=0, callbacks=[losses]).fit(module, tiny_rooms(augment=False))
    assert sum(losses.losses[-4:]) < sum(losses.losses[:4])


def test_the_decoder_starts_from_the_teachers(teacher_file, tmp_path):
    module = student(teacher_file)
    module.setup("fit")
    theirs = load_module(DepthTeacher, teacher_file).network.decoder.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in module.network.decoder.state_dict().items())


@pytest.mark.parametrize("step", [2, 3, 5], ids=["between epochs", "in an epoch", "in the last epoch"])
def test_resumes_bit_equal_from_a_mid_run_checkpoint(step, teacher_file, tmp_path):
    whole, rest = Losses(), Losses()
    saved = tmp_path / "mid.ckpt"
    first = student(teacher_file)
    trainer(tmp_path, max_epochs=3, callbacks=[whole, SaveAfter(step, saved)]).fit(first, tiny_rooms())
    second = PanoramicDepth(**TINY, teacher=str(teacher_file))  # other weights: they must come from the file
    trainer(tmp_path, max_epochs=3, callbacks=[rest]).fit(second, tiny_rooms(), ckpt_path=saved)
    assert len(whole.losses) == 6
    assert rest.losses == whole.losses[step:]
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_no_checkpoint_holds_the_teacher_and_the_deployed_file_only_the_model(teacher_file, tmp_path):
    module = student(teacher_file)
    fitted = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    fitted.fit(module, tiny_rooms())
    fitted.save_checkpoint(tmp_path / "training.ckpt")
    module.deploy(tmp_path / "student.ckpt")
    training = torch.load(tmp_path / "training.ckpt", weights_only=True)["state_dict"]
    deployed = torch.load(tmp_path / "student.ckpt", weights_only=True)
    teachers = {tuple(v.shape): v for v in torch.load(teacher_file, weights_only=True)["state_dict"].values() if v.ndim == 4}
    assert not [key for key in training if "teacher" in key]
    assert {key.split(".")[0] for key in deployed["state_dict"]} == {"network"}
    assert set(deployed) == {"state_dict", "hyper_parameters", "pytorch-lightning_version"}
    assert "teacher" not in deployed["hyper_parameters"]
    assert teachers, "the teacher has convolutions to look for"
    for value in deployed["state_dict"].values():
        assert not (tuple(value.shape) in teachers and torch.equal(value, teachers[tuple(value.shape)]))
    image = torch.rand(1, 3, 32, 64)
    # Without the teacher's file, as where the model is used.
    loaded = PanoramicDepth.load_from_checkpoint(tmp_path / "student.ckpt").eval()
    torch.testing.assert_close(loaded(image), module.eval()(image))


def test_a_second_fit_goes_on_with_the_trained_decoder(teacher_file, tmp_path):
    module = student(teacher_file)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, tiny_rooms())
    trained = {name: value.clone() for name, value in module.network.decoder.state_dict().items()}
    module.setup("fit")
    assert all(torch.equal(value, trained[name]) for name, value in module.network.decoder.state_dict().items())


def test_predicts_photographs_of_any_size():
    module = student(None, image_height=32)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    depth_m = module.predict_panorama(torch.rand(3, 100, 200))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "it learned from a photograph"
    assert depth_m.shape == (100, 200)
    seam, inside = (depth_m[:, 0] - depth_m[:, -1]).abs().mean(), depth_m.diff(dim=1).abs().mean()
    assert seam < 2 * inside


@pytest.mark.parametrize("image", [torch.rand(3, 64, 64), torch.rand(1, 64, 128), torch.zeros(3, 64, 128, dtype=torch.uint8)])
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"image must be \(3, H, 2 H\) of floats in \[0, 1\], got"):
        student(None).predict_panorama(image)


def test_another_size_than_the_trained_one_is_said():
    with pytest.warns(UserWarning, match="trained on images of 32 rows and gets 64"):
        student(None, image_height=32).eval().predict_step({"image": torch.rand(1, 3, 64, 128)}, 0)


def test_a_schedule_without_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a number of steps, and this Trainer has inf; give max_epochs"):
        trainer(tmp_path, max_epochs=-1, limit_val_batches=0).fit(student(None), tiny_rooms())


def test_repr_says_which_lightning_it_was_built_for():
    assert built_for() in repr(student(None))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learning_rate": 0}, "learning_rate must be greater than 0, got 0"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more, got -1"),
        ({"distance": "l2"}, "distance must name a distance of features, got 'l2'; did you mean l1"),
        ({"distillation_weight": -0.5}, "distillation_weight must be 0 or more, got -0.5"),
        ({"widths": [1, 2, 3]}, r"five channel counts for strides 2 to 32, got \[1, 2, 3\]"),
        ({"sphere_widths": [8, 8, 8, 8, 8]}, "sphere_widths must be up to four channel counts"),
        ({"sphere_widths": [0]}, "sphere_widths must be up to four channel counts"),
        ({"depth_loss": "l1"}, "depth_loss must name a loss of depth, got 'l1'"),
        ({"preset": "unifuze"}, "did you mean unifuse"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PanoramicDepth(**{**TINY, **options})


def test_bad_checkpoints_are_refused_in_one_sentence(teacher_file, tmp_path):
    whole = teacher_file.read_bytes()
    (tmp_path / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    student(None).deploy(tmp_path / "student.ckpt")
    bigger = torch.load(tmp_path / "student.ckpt", weights_only=True)
    bigger["hyper_parameters"]["widths"] = [9, 8, 8, 16, 16]
    torch.save(bigger, tmp_path / "bigger.ckpt")
    for name, kind, sentence in (
        ("missing", PanoramicDepth, "does not exist"),
        ("truncated", DepthTeacher, "truncated or no checkpoint"),
        ("text", PanoramicDepth, "truncated or no checkpoint"),
        ("empty", PanoramicDepth, "truncated or no checkpoint"),
        ("other", PanoramicDepth, "holds no state_dict with hyper_parameters"),
        ("student", DepthTeacher, "another model than DepthTeacher"),
        ("bigger", PanoramicDepth, "another architecture: .* tensors differ"),
    ):
        with pytest.raises(ValueError, match=sentence) as refusal:
            load_module(kind, tmp_path / f"{name}.ckpt")
        assert "\n" not in str(refusal.value)


def test_a_teacher_of_other_widths_is_refused(teacher_file, tmp_path):
    module = PanoramicDepth(**{**TINY, "widths": [8, 8, 8, 16, 24]}, teacher=str(teacher_file))
    with pytest.raises(ValueError, match=r"has widths \[8, 8, 8, 16, 16\], the student \[8, 8, 8, 16, 24\]"):
        module.setup("fit")
