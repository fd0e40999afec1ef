"""That all ranks mean the same step: asked with one small all-reduce, and answered by name where they do not."""

import json
import zlib
from collections.abc import Sequence

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange

FINE, NOT_FINITE, REFUSED = 0, 1, 2


def agree(
    condition: int, selected: Sequence[int], alike: dict[str, object], exchange: Exchange, refusal: str = ""
) -> tuple[int, list[int]]:
    """Return the worst condition of any rank and the largest of each of ``selected``.

    Args:
        condition: ``FINE``, ``NOT_FINITE`` or ``REFUSED`` on this rank.
        selected: entries that this rank would send of each segment, as many segments on every rank.
        alike: what has to be equal on all ranks, by name; whole numbers, or a dict of settings.
        exchange: the ranks.
        refusal: the sentence of a rank that refuses.

    Raises:
        InputError: on every rank, if one refuses or they differ; it names the ranks.
    """
    numbers = [_number(value) for value in alike.values()]
    answer = exchange.largest_integers([condition, *numbers, *(-number for number in numbers), *selected], "agreement")
    worst, most = answer[0], answer[1 + 2 * len(numbers) :]
    largest, smallest = answer[1 : 1 + len(numbers)], [-number for number in answer[1 + len(numbers) : 1 + 2 * len(numbers)]]
    if worst == REFUSED:
        said = [(rank, text) for rank, text in enumerate(exchange.all_gather_text(refusal)) if text]
        raise InputError("; ".join(f"rank {rank}: {text}" if exchange.ranks > 1 else text for rank, text in said))
    if largest != smallest:
        raise InputError(_difference(exchange.all_gather_text(json.dumps(alike, sort_keys=True))))
    return worst, most


def checksum(value: object) -> int:
    """Return a number that differs where plain values do."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _number(value: object) -> int:
    return value if isinstance(value, int) else checksum(value)


def _difference(texts: list[str]) -> str:
    """Say what the first rank that differs from rank 0 has instead."""
    flat = [_flattened(json.loads(text)) for text in texts]
    for rank, of_rank in enumerate(flat):
        for name, value in of_rank.items():
            if flat[0].get(name) != value:
                return (
                    f"the ranks must agree in {name}: rank 0 has {flat[0].get(name)}, rank {rank} has {value}; give all ranks "
                    "the same model, settings and checkpoint"
                )
    return "the ranks answered differently and agree when asked again; give all ranks the same model, settings and checkpoint"


def _flattened(alike: dict[str, object]) -> dict[str, object]:
    settings = alike.pop("settings", {})
    assert isinstance(settings, dict)
    return {**alike, **settings}
