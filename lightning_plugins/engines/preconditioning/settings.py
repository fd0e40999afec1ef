"""Checks that the settings of several methods share."""

import math
from typing import Literal

from lightning_plugins._support.errors import InputError


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_decay(name: str, value: float) -> None:
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise InputError(f"{name} must be in [0, 1), got {value}; 0.95 averages over about 20 updates, 0 keeps the newest alone")


def check_positive(name: str, value: float) -> None:
    if not _is_number(value) or not value > 0:
        raise InputError(f"{name} must be above 0, got {value!r}")
    if value == math.inf:
        raise InputError(f"{name} must be finite, got {value}")


def check_count(name: str, value: int) -> None:
    if not _is_number(value) or not 1 <= value < math.inf or value != int(value):
        raise InputError(f"{name} must be a whole number of 1 or more, got {value}")


def check_limit(name: str, value: int) -> None:
    if not _is_number(value) or not 0 <= value < math.inf or value != int(value):
        raise InputError(f"{name} must be a whole number of 0 or more, got {value}; 0 leaves out every axis")


def check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise InputError(f"{name} must be one of {', '.join(valid)}, got {value!r}")


Positions = Literal["expand", "reduce"]
POSITIONS = ("expand", "reduce")
