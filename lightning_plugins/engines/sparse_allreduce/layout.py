"""Where each parameter's elements stand in the one vector that is reduced, whatever buckets they arrive in.

Parameters are known by name, and stand in segments, which are exchanged one by one where the mode streams. A bucket of DDP is
a list of parameters, too, and changes: the first backward pass of a process brings other buckets than the following ones.
"""

from collections.abc import Sequence
from itertools import accumulate


class Layout:
    """Parameters end to end.

    Args:
        sizes: elements of each parameter.
        segments: names of each segment, in order; each name once.
    """

    def __init__(self, sizes: dict[str, int], segments: Sequence[Sequence[str]]) -> None:
        self.sizes = sizes
        self.segments = [list(segment) for segment in segments]
        names = [name for segment in self.segments for name in segment]
        assert sorted(names) == sorted(sizes), "a layout holds each parameter once"
        ends = list(accumulate(sizes[name] for name in names))
        self.starts = {name: end - sizes[name] for name, end in zip(names, ends, strict=True)}
        self.elements = ends[-1] if ends else 0

    def bounds(self, number: int) -> tuple[int, int]:
        """Return start and end of a segment."""
        segment = self.segments[number]
        return self.starts[segment[0]], self.starts[segment[-1]] + self.sizes[segment[-1]]

    def runs(self, names: Sequence[str]) -> list[tuple[int, int, int]]:
        """Return how a bucket of these parameters lies here: ``(start in the bucket, start here, length)``, merged."""
        found: list[tuple[int, int, int]] = []
        place = 0
        for name in names:
            start, size = self.starts[name], self.sizes[name]
            if found and found[-1][1] + found[-1][2] == start:
                found[-1] = (found[-1][0], found[-1][1], found[-1][2] + size)
            else:
                found.append((place, start, size))
            place += size
        return found
