"""Which run a captured state belongs to: the script and where it writes, which of its fits, and the model that it trains."""

import hashlib
import os
import sys
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn

_fits: dict[str, int] = defaultdict(int)  # of each job, in this process: how many have begun


def default_job(root: str | Path) -> str:
    """Return a name for the runs of this script that write below ``root``."""
    script = Path(sys.argv[0]).resolve() if sys.argv and sys.argv[0] else Path(sys.executable)
    return hashlib.sha256(f"{script}\0{Path(root).resolve()}\0{os.getuid()}".encode()).hexdigest()[:24]


def next_fit(job: str) -> int:
    """Return the number of the fit that begins now; a script that is started again counts them again from 0."""
    _fits[job] += 1
    return _fits[job] - 1


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Return what a state has to fit: the module's class, and a checksum of its parameters' names, shapes and placements."""
    shapes = ";".join(
        f"{name}:{tuple(parameter.shape)}{getattr(parameter, 'placements', '')}" for name, parameter in module.named_parameters()
    )
    return {"module": f"{type(module).__module__}.{type(module).__qualname__}", "parameters": zlib.crc32(shapes.encode())}
