"""The options of the recipe ``level_then_depth``, and what they refuse before the first minute of training."""

from typing import Any, Literal

from lightning_plugins import PanoramicDepth, PanoramicUpright, RenderedRooms
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.lightning_cli import RecipeCLI
from lightning_plugins.recipes.phases import check_trainer
from lightning_plugins.recipes.targets import shipped_yaml


class CLI(RecipeCLI):
    """The options: both models', their data's and the Trainer's, and these."""

    def __init__(self, folder: RunFolder, options: list[str]) -> None:
        defaults = ["--config", str(shipped_yaml("level_then_depth"))]
        super().__init__(folder, [*defaults, *options], model_class=PanoramicDepth, datamodule_class=RenderedRooms)

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_class_arguments(PanoramicUpright, "upright")
        parser.add_class_arguments(RenderedRooms, "upright_data")
        parser.link_arguments("upright_data.height", "upright.image_height")
        parser.link_arguments("data.height", "model.image_height")
        parser.add_argument("--upright_epochs", type=int, default=6, help="epochs of the upright model")
        parser.add_argument("--image", type=str | None, default=None, help="a photograph, or a folder of them")
        parser.add_argument("--upright_ckpt", type=str | None, default=None, help="a trained PanoramicUpright")
        parser.add_argument("--depth_ckpt", type=str | None, default=None, help="a trained PanoramicDepth")
        parser.add_argument("--wandb", type=Literal["offline", "online", "disabled"], default="offline", help="the W&B run")
        parser.add_argument("--wandb_photographs", type=bool, default=False, help="put your photographs into the W&B run, too")


def check_options(cli: CLI, options: list[str], depth: PanoramicDepth | None) -> None:
    """Refuse numbers without a training, options that cannot act beside a checkpoint, and a given depth model of another size."""
    knobs, names = cli.config, [option.partition("=")[0] for option in options if option.startswith("--")]
    for checkpoint, group in (("upright_ckpt", "--upright"), ("depth_ckpt", "--model.")):
        idle = [name for name in names if name.startswith(group) and name not in ("--model.preset", "--upright_ckpt")]
        if knobs[checkpoint] and idle:
            raise InputError(
                f"{idle[0]} cannot act beside --{checkpoint}, which brings a trained model; leave one of the two out"
            )
    if depth is not None and (rows := depth.hparams["image_height"]) != knobs.data.height:
        raise InputError(
            f"data.height must be that of the images which {knobs.depth_ckpt} was trained on, got {knobs.data.height}; "
            f"give --data.height {rows}"
        )
    if knobs.upright_epochs < 1:
        raise InputError(f"upright_epochs must be 1 or more, got {knobs.upright_epochs}; to train nothing: --upright_ckpt FILE")
    if knobs.upright_data.tilt is None:
        raise InputError("upright_data.tilt must name tilts to train on, got none; cone:40 is within 40 degrees")
    if knobs.data.tilt is not None:
        raise InputError(f"data.tilt cannot act, got {knobs.data.tilt}: depth is trained on level rooms; leave it out")
    check_trainer(knobs.trainer)
