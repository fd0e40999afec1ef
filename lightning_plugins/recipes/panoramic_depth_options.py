"""The options of the recipe ``panoramic_depth``, and what they refuse before the first minute of training."""

from typing import Any, Literal

from lightning_plugins import DepthTeacher, PanoramicDepth, RenderedRooms
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.models.checkpoint import load_module
from lightning_plugins.recipes.lightning_cli import RecipeCLI
from lightning_plugins.recipes.phases import check_trainer
from lightning_plugins.recipes.targets import shipped_yaml


class CLI(RecipeCLI):
    """The options: the model's, the data's and the Trainer's, and these."""

    def __init__(self, folder: RunFolder, options: list[str]) -> None:
        defaults = ["--config", str(shipped_yaml("panoramic_depth"))]
        super().__init__(folder, [*defaults, *options], model_class=PanoramicDepth, datamodule_class=RenderedRooms)

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_class_arguments(DepthTeacher, "teacher")
        for shared in ("widths", "head", "max_depth_m", "preset"):
            parser.link_arguments(f"model.{shared}", f"teacher.{shared}")
        parser.link_arguments("data.height", "model.image_height")
        parser.add_argument("--teacher_epochs", type=int, default=4, help="epochs of the teacher")
        parser.add_argument("--image", type=str | None, default=None, help="a photograph, or a folder of them, to predict on")
        parser.add_argument("--ckpt", type=str | None, default=None, help="a student's checkpoint: skips the training")
        parser.add_argument("--wandb", type=Literal["offline", "online", "disabled"], default="offline", help="the W&B run")
        parser.add_argument("--wandb_photographs", type=bool, default=False, help="put your photographs into the W&B run, too")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        model, own = self.config["model"], str(self.folder.path / "teacher.ckpt")
        # A resumed run finds its own teacher in the configuration that it saved.
        self.makes_teacher = model["teacher"] in (None, own)
        model["teacher"] = model["teacher"] or own


def check_options(cli: CLI, options: list[str]) -> None:
    """Refuse numbers without a training, a teacher that cannot be read, and options that cannot act beside a checkpoint."""
    knobs, names = cli.config, [option.partition("=")[0] for option in options if option.startswith("--")]
    of_teacher = [name for name in names if name.startswith("--teacher")]
    of_model = [name for name in names if name.startswith("--model") and name != "--model.preset"]
    if knobs.ckpt and (idle := of_model + of_teacher):
        raise InputError(f"{idle[0]} cannot act beside --ckpt, which brings a trained model; leave one of the two out")
    if not cli.makes_teacher:
        load_module(DepthTeacher, knobs.model.teacher)
        if idle := of_teacher or ["--model.teacher"] * (cli.model.teacher_path is None):
            raise InputError(
                f"{idle[0]} cannot act: --model.teacher trains no teacher, and weight 0 of the distillation needs none"
            )
    if knobs.teacher_epochs < 1:
        raise InputError(
            f"teacher_epochs must be 1 or more, got {knobs.teacher_epochs}; to do without: --model.distillation_weight 0"
        )
    check_trainer(knobs.trainer)
