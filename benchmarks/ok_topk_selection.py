"""What adding the residual, selecting and packing cost on one core, beside other ways to find the largest entries.

Claim: for 16.8 million float32 gradients at a density of 1 %, adding the residual, selecting by a threshold that is known and
packing four messages take at most 150 ms on one core. Beside it, on the same vector: ``torch.topk``, ``kthvalue``, a mask and
``nonzero`` at a known threshold, numpy's ``argpartition``, the threshold of a normal fit, that of a sample, and our exact
selection, at densities of 0.1, 1 and 5 %; then encoding and decoding in every code of the wire. All of a density's contestants
run in turn, in an order that is shuffled every round; the figures are medians over the rounds. A known threshold selects exactly
k here, since it was computed on the same vector: what a step's threshold misses is not this file's subject.

With --gpu the same at 133.5 million elements on a GPU, against the time in which a copy moves as many bytes as each step has to
read and write at least.

Run: python benchmarks/ok_topk_selection.py [--repeats N] [--gpu] [--tiny]
     --tiny takes 65,536 elements and writes nothing; with --gpu it runs on the CPU where there is no GPU.
Writes: benchmarks/results/ok_topk_selection.csv, with --gpu ok_topk_selection_gpu.csv.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from _ok_topk import Gradients
from _results import write_results
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce.rivals import fitted_threshold
from lightning_plugins.engines.sparse_allreduce.selection import accumulate, largest, sampled_threshold, select
from lightning_plugins.engines.sparse_allreduce.wire import Wire

ELEMENTS, GPU_ELEMENTS, TINY_ELEMENTS = 1 << 24, 133_547_324, 1 << 16
DENSITIES = (0.001, 0.01, 0.05)
GOAL_DENSITY, GOAL_MS = 0.01, 150.0
REGIONS = 4
FEEDBACK_STEPS = 6  # after which the residual has more than one gradient in it
CODES = ("int32", "delta16", "bitmap", "auto")
VALUES = ("exact", "bfloat16")
PATH_WIRES = (("auto", "exact"), ("int32", "exact"), ("delta16", "bfloat16"))

Messages = list[tuple[int, Tensor, int, int]]  # header, bytes, start and span of the region


def residual_after(gradients: Gradients, k: int) -> Tensor:
    """Return what waits after some steps of which each sent its ``k`` largest entries."""
    residual = torch.zeros_like(gradients.profile)
    for _ in range(FEEDBACK_STEPS):
        residual += gradients.next()
        residual[largest(residual, k)[0]] = 0
    return residual


def pack(acc: Tensor, chosen: Tensor, wire: Wire) -> Messages:
    """Return a message for each of ``REGIONS`` regions that hold as many entries each."""
    values = wire.rounded(acc[chosen])
    inner = chosen[[len(chosen) * cut // REGIONS for cut in range(1, REGIONS)]].tolist()
    cuts = [0, *inner, len(acc)]
    parts = torch.searchsorted(chosen, torch.tensor(inner, device=chosen.device)).tolist()
    split = zip(chosen.tensor_split(parts), values.tensor_split(parts), cuts[:-1], cuts[1:], strict=True)
    return [(*wire.encode(places, of_region, start, end - start), start, end - start) for places, of_region, start, end in split]


def unpack(messages: Messages, wire: Wire, out: Tensor) -> Tensor:
    """Write what arrived into a vector of zeros."""
    out.zero_()
    for header, message, start, span in messages:
        places, values = wire.decode(header, message, start, span)
        out[places] = values
    return out


class Median(NamedTuple):
    """Seconds by the clock, and of the processor, which busy neighbours raise less."""

    s: float
    processor_s: float


def in_turn(contestants: dict[str, Callable[[], Any]], repeats: int, wait: Callable[[], Any] = lambda: None) -> dict[str, Median]:
    """Return the median times of each, after one round that does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    shuffle, order = random.Random(0), list(contestants)
    for repeat in range(repeats + 1):
        shuffle.shuffle(order)
        for name in order:
            wait()
            start_s, start_processor_s = time.perf_counter(), time.process_time()
            contestants[name]()
            wait()
            if repeat:
                times[name].append((time.perf_counter() - start_s, time.process_time() - start_processor_s))
    return {name: Median(*map(statistics.median, zip(*taken, strict=True))) for name, taken in times.items()}


def compare(elements: int, density: float, repeats: int) -> list[dict[str, Any]]:
    """Time the parts of our path, the ways to select and the codes, for one density."""
    k = round(density * elements)
    gradients = Gradients(elements)
    residual, gradient = residual_after(gradients, k), gradients.next()
    acc = torch.empty_like(residual)
    accumulate(residual, gradient, acc)
    chosen, threshold = largest(acc, k)
    wires = {(code, values): Wire(code, values, acc.dtype) for code in CODES for values in VALUES}
    packed = {key: pack(acc, chosen, wire) for key, wire in wires.items()}
    out = torch.empty_like(acc)

    def path(wire: Wire) -> Messages:
        accumulate(residual, gradient, acc)
        return pack(acc, select(acc, threshold), wire)

    def exact_path() -> Messages:
        accumulate(residual, gradient, acc)
        return pack(acc, largest(acc, k)[0], wires["auto", "exact"])

    selections: dict[str, Callable[[], int]] = {
        "known threshold, ours": lambda: len(select(acc, threshold)),
        "exact, ours": lambda: len(largest(acc, k)[0]),
        "sampled threshold": lambda: len(select(acc, sampled_threshold(acc, k))),
        "normal fit": lambda: len(select(acc, fitted_threshold(acc, k))),
        "known threshold, mask and nonzero": lambda: len((acc.abs() >= threshold).nonzero()),
        "torch.topk": lambda: len(torch.topk(acc.abs(), k, sorted=False).indices),
        "torch.kthvalue, mask and nonzero": lambda: len(_by_kthvalue(acc, k)),
        "numpy.argpartition": lambda: len(np.argpartition(np.abs(acc.numpy()), elements - k)[elements - k :]),
    }
    paths: dict[str, Callable[[], Any]] = {
        f"path, {code} {values}": lambda key=(code, values): path(wires[key]) for code, values in PATH_WIRES
    }
    contestants: dict[str, Callable[[], Any]] = {
        **paths,
        "path of an exact step, auto exact": exact_path,
        "add": lambda: accumulate(residual, gradient, acc),
        **selections,
        **{f"encode, {code} {values}": lambda key=(code, values): pack(acc, chosen, wires[key]) for code, values in wires},
        **{f"decode, {code} {values}": lambda key=(code, values): unpack(packed[key], wires[key], out) for code, values in wires},
    }
    medians = in_turn(contestants, repeats)
    rows = []
    for name, (seconds, processor_s) in medians.items():
        row: dict[str, Any] = {"elements": elements, "density": density, "what": name, "median_ms": f"{1e3 * seconds:.2f}"}
        row["median_processor_ms"] = f"{1e3 * processor_s:.2f}"
        if name in selections:
            row["selected_over_k"] = f"{selections[name]() / k:.4f}"
            row["times_ours"] = f"{seconds / medians['known threshold, ours'].s:.2f}"
        key = tuple(name.partition(", ")[2].split())
        if key in packed:
            row["bytes_per_entry"] = f"{sum(len(message) for _, message, *_ in packed[key]) / k:.3f}"
        if density == GOAL_DENSITY and name in paths:
            row["goal_ms"] = GOAL_MS
            row["verdict"] = "held" if 1e3 * seconds <= GOAL_MS else "MISSED"
        rows.append({**row, "repeats": repeats, "threads": torch.get_num_threads()})
    return rows


def _by_kthvalue(acc: Tensor, k: int) -> Tensor:
    magnitudes = acc.abs()
    return (magnitudes >= magnitudes.kthvalue(len(acc) - k + 1).values).nonzero()


def compare_on_gpu(elements: int, density: float, repeats: int, device: str) -> list[dict[str, Any]]:
    """Time each step of a sparse step against what a copy of as many bytes takes."""
    k = round(density * elements)
    gradients = Gradients(elements, device=device)
    residual, gradient = residual_after(gradients, k), gradients.next()
    acc, out = torch.empty_like(residual), torch.empty_like(residual)
    accumulate(residual, gradient, acc)
    chosen, threshold = largest(acc, k)
    contestants: dict[str, Callable[[], Any]] = {"copy": lambda: out.copy_(acc)}
    # Read and written at least, in bytes: elements of 4, positions of 8, values of 4.
    least = {"copy": 8 * elements, "add": 12 * elements, "select": 4 * elements + 8 * k}
    contestants["add"] = lambda: accumulate(residual, gradient, acc)
    contestants["select"] = lambda: select(acc, threshold)
    for name, other in (
        ("exact, ours", lambda: largest(acc, k)),
        ("torch.topk", lambda: torch.topk(acc.abs(), k, sorted=False)),
    ):
        contestants[name], least[name] = other, least["select"]
    for code, values in PATH_WIRES:
        wire = Wire(code, values, acc.dtype)
        packed = pack(acc, chosen, wire)
        length = sum(len(message) for _, message, *_ in packed)
        contestants[f"pack, {code} {values}"] = lambda wire=wire: pack(acc, chosen, wire)
        contestants[f"unpack, {code} {values}"] = lambda wire=wire, packed=packed: unpack(packed, wire, out)
        least[f"pack, {code} {values}"] = 12 * k + length
        least[f"unpack, {code} {values}"] = 4 * elements + 4 * k + length
    medians = in_turn(contestants, repeats, torch.cuda.synchronize if device == "cuda" else lambda: None)
    bytes_per_s = least["copy"] / medians["copy"].s
    return [
        {
            "elements": elements,
            "density": density,
            "what": name,
            "median_ms": f"{1e3 * seconds:.3f}",
            "floor_ms": f"{1e3 * least[name] / bytes_per_s:.3f}",
            "times_floor": f"{seconds * bytes_per_s / least[name]:.2f}",
            "copy_gb_per_s": f"{1e-9 * bytes_per_s:.1f}",
            "repeats": repeats,
        }
        for name, (seconds, _) in medians.items()
    ]


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="try it out: few elements, nothing is written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.gpu and not (torch.cuda.is_available() or given.tiny):
        raise SystemExit("torch finds no GPU here; leave --gpu out, or give --tiny as well to try its code on the CPU")
    rows = []
    for density in DENSITIES:
        if given.gpu:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            rows += compare_on_gpu(TINY_ELEMENTS if given.tiny else GPU_ELEMENTS, density, given.repeats, device)
        else:
            rows += compare(TINY_ELEMENTS if given.tiny else ELEMENTS, density, given.repeats)
    shown = (
        "what",
        "median_ms",
        "median_processor_ms",
        "times_ours",
        "selected_over_k",
        "bytes_per_entry",
        "times_floor",
        "verdict",
    )
    for row in rows:
        print(f"{row['density']:6.1%}", *(f"{name}={row[name]}" for name in shown if name in row), sep="  ")
    if not given.tiny:
        print("wrote", write_results("ok_topk_selection_gpu" if given.gpu else "ok_topk_selection", rows))


if __name__ == "__main__":
    main()
