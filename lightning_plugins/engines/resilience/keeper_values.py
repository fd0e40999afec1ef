"""What the keeper's client gives out."""

from typing import Any, NamedTuple

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.keeper_folder import KeeperError


class NoCopyError(KeeperError):
    """A peer could not be reached, was refused, or does not hold what was wanted."""


class TooLittleMemoryError(InputError):
    """The host has not as much memory as slots of the wanted size take.

    Attributes:
        needed_bytes: more than is held already.
        available_bytes: what may be taken.
    """

    def __init__(self, message: str, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(f"{message}; capture less, give the job more memory, or capture to disk")
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes


class Captured(NamedTuple):
    """What a capture took.

    Attributes:
        bytes: of data.
        seconds: that the caller was blocked.
    """

    bytes: int
    seconds: float


class Generation(NamedTuple):
    """What one slot holds.

    Attributes:
        shard: name.
        step: number.
        state: ``writing``, ``sealed`` or ``committed``.
        bytes: of data; 0 while it is written, as for what follows.
        meta: plain values that came with it.
        written_at: seconds since 1970.
        is_copy: whether another host has captured it, and pushed it here.
        digest: hexadecimal; equal if and only if step, meta and every bit of the state are.
    """

    shard: str
    step: int
    state: str
    bytes: int
    meta: dict[str, Any]
    written_at: float
    is_copy: bool = False
    digest: str = ""
