"""What the panoramic models take as one photograph."""

from torch import Tensor

from lightning_plugins._support.errors import InputError


def check_photograph(image: Tensor) -> None:
    """Refuse what is no photograph ``(3, H, 2 H)``, within 1 %, of floating point numbers.

    Raises:
        InputError: if it is none.
    """
    if (
        image.ndim != 3
        or len(image) != 3
        or not image.is_floating_point()
        or abs(image.shape[2] - 2 * image.shape[1]) > 0.01 * image.shape[2]
    ):
        raise InputError(
            f"image must be (3, H, 2 H) of floats in [0, 1], got {tuple(image.shape)} of {image.dtype}; crop or pad to 2:1"
        )
