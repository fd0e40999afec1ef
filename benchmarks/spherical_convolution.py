"""SphericalConv2d beside a planar 3 x 3 Conv2d with the same channels and, within 2 %, as many nodes.

Claim: the spherical convolution costs a small multiple of the planar one it replaces, forward and with backward. Ours and the
rival run alternately, so that busy neighbours slow both; figures are medians over the repeats, the ratio the median of the
pairs' ratios. Conv2d has nothing to tune: kernel 3, padding 1, contiguous tensors. Our tables are built once, in ``build_ms``.

Run: OMP_NUM_THREADS=1 python benchmarks/spherical_convolution.py
Writes: benchmarks/results/spherical_convolution.csv
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from _results import write_results
from torch import nn

from lightning_plugins.engines.sphere import EquirectangularGrid, SpherePoints, SphericalConv2d, icosphere

BATCH = 8
REPEATS = 15
CHANNELS = (32, 64, 128)
# Name, domain, and the planar image of as many nodes.
DOMAINS = (
    ("642 points", SpherePoints(icosphere(3)), (18, 36)),
    ("2562 points", SpherePoints(icosphere(4)), (36, 72)),
    ("32 x 64 grid", EquirectangularGrid(32, 64), (32, 64)),
)


def seconds(run: Callable[[], object]) -> float:
    """Return how long one run takes, until the device is idle."""
    start_s = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def alternate(ours: Callable[[], object], rival: Callable[[], object]) -> dict[str, float]:
    """Return the medians in milliseconds of runs in turn, and the median ratio, after two rounds that do not count."""
    pairs = [(seconds(ours), seconds(rival)) for _ in range(REPEATS + 2)][2:]
    return {
        "ours_ms": statistics.median(a for a, _ in pairs) * 1e3,
        "conv2d_ms": statistics.median(b for _, b in pairs) * 1e3,
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def main() -> None:
    """Measure, print, write."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    print(f"{'domain':13} {'channels':>8} {'kernel':>12} {'pass':>9} {'ours ms':>8} {'Conv2d ms':>9} {'ratio':>6}")
    for name, domain, size in DOMAINS:
        for channels in CHANNELS:
            rival = nn.Conv2d(channels, channels, 3, padding=1).to(device)
            planar = torch.randn(BATCH, channels, *size, device=device, requires_grad=True)
            values = torch.randn(BATCH, channels, *domain.shape, device=device, requires_grad=True)
            for kernel in ("anisotropic", "isotropic"):
                start_s = time.perf_counter()
                conv = SphericalConv2d(channels, channels, domain, isotropic=kernel == "isotropic").to(device)
                build_ms = (time.perf_counter() - start_s) * 1e3
                passes = {
                    "forward": (lambda c=conv, v=values: c(v).detach(), lambda r=rival, p=planar: r(p).detach()),
                    "both": (lambda c=conv, v=values: c(v).sum().backward(), lambda r=rival, p=planar: r(p).sum().backward()),
                }
                for which, (ours, theirs) in passes.items():
                    figures = alternate(ours, theirs)
                    print(
                        f"{name:13} {channels:8} {kernel:>12} {which:>9} {figures['ours_ms']:8.2f} "
                        f"{figures['conv2d_ms']:9.2f} {figures['ratio']:6.2f}"
                    )
                    setting = {"domain": name, "channels": channels, "kernel": kernel, "pass": which}
                    rounded = {key: f"{value:.3f}" for key, value in figures.items()}
                    rows.append(
                        setting
                        | rounded
                        | {"build_ms": f"{build_ms:.0f}", "batch": BATCH, "repeats": REPEATS, "threads": torch.get_num_threads()}
                    )
    print(f"wrote {write_results('spherical_convolution', rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
