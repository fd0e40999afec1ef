"""Writing a benchmark's CSV: each row with the hardware, the versions and the command that made it."""

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_plugins.reporting.tables import write_table

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Return the name of the processor and its cores, or of the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def write_results(claim: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``results/<claim>.csv`` and return its path; rows kept from an earlier run say by themselves what made them."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "pytorch-lightning"))
    proof = {
        "hardware": processor(),
        "versions": f"Python {platform.python_version()}, {versions}",
        "command": f"python {Path(sys.argv[0]).parent.name}/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
    }
    path = RESULTS / f"{claim}.csv"
    write_table(path, [{**row, **{name: row.get(name, value) for name, value in proof.items()}} for row in rows])
    return path
