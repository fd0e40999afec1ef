"""The options of the recipe ``panoramic_upright``, and what they refuse before the first minute of training."""

from pathlib import Path
from typing import Any, Literal

from lightning_plugins import PanoramicUpright, RenderedRooms
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins._support.video_container import read_video_parts
from lightning_plugins.models.panoramic_upright.video_frames import FrameReader
from lightning_plugins.recipes.lightning_cli import RecipeCLI
from lightning_plugins.recipes.phases import check_trainer
from lightning_plugins.recipes.targets import shipped_yaml

# A flag on the command line, a knob with a value in the YAML.
_FLAGS = {"--tags-only": "--tags_only=true"}


class CLI(RecipeCLI):
    """The options: the model's, the data's and the Trainer's, and these."""

    def __init__(self, folder: RunFolder, options: list[str]) -> None:
        defaults = ["--config", str(shipped_yaml("panoramic_upright"))]
        options = [_FLAGS.get(option, option) for option in options]
        super().__init__(folder, [*defaults, *options], model_class=PanoramicUpright, datamodule_class=RenderedRooms)

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.link_arguments("data.height", "model.image_height")
        parser.add_argument("--image", type=str | None, default=None, help="a photograph, or a folder of them, to level")
        parser.add_argument("--tags_only", type=bool, default=False, help="keep the pixels, write the pose into a copy's tags")
        parser.add_argument("--video", type=str | None, default=None, help="a panoramic video to level")
        parser.add_argument("--ckpt", type=str | None, default=None, help="a trained checkpoint: skips the training")
        parser.add_argument("--wandb", type=Literal["offline", "online", "disabled"], default="offline", help="the W&B run")
        parser.add_argument("--wandb_photographs", type=bool, default=False, help="put your photographs into the W&B run, too")


def check_options(cli: CLI, options: list[str]) -> None:
    """Refuse numbers without a training, options that cannot act, and a video that is not there."""
    knobs, names = cli.config, [option.partition("=")[0] for option in options if option.startswith("--")]
    of_model = [name for name in names if name.startswith("--model")]
    if knobs.ckpt and of_model:
        raise InputError(f"{of_model[0]} cannot act beside --ckpt, which brings a trained model; leave one of the two out")
    if knobs.tags_only and not knobs.image:
        raise InputError("tags_only cannot act without photographs, got no image; give --image FILE_OR_FOLDER")
    if knobs.video:
        if not (video := Path(knobs.video)).is_file():
            raise InputError(f"the video {video} does not exist; give the path of a 2:1 video")
        FrameReader(video, read_video_parts(video))  # refuses what cannot be opened, or is not 2:1
    if knobs.data.tilt is None and not knobs.ckpt:
        raise InputError("data.tilt must name tilts to train on, got none; small is within 20 degrees, mixed half anywhere")
    if knobs.model.reconstruct and not knobs.ckpt:
        if not knobs.data.with_level:
            raise InputError(
                "model.reconstruct learns from level images, and data.with_level is off; give --data.with_level true"
            )
        if knobs.trainer.gradient_clip_val is not None:
            raise InputError(
                f"trainer.gradient_clip_val cannot act with model.reconstruct, got {knobs.trainer.gradient_clip_val}; give "
                "--trainer.gradient_clip_val null, and --model.gradient_clip_norm 1.0 for the same"
            )
    check_trainer(knobs.trainer)
