"""When the bytes leave: in mode streamed before the last gradient exists, in mode global after it.

Claim: with several buckets, Ok-Topk in mode ``streamed`` sends an ordinary step's bytes while backward still computes, although
thresholds and budget are those of the whole model; in mode ``global``, the paper's, nothing leaves before the last gradient is
there. And where backward leaves the processors alone, as it does on an accelerator, the step ends sooner for it. A hook on every
parameter notes when its gradient has been computed, before DDP hears of it; every collective of the engine is timed from
outside. A collective's bytes count as having left before the last gradient if the collective had *returned* by then; those of one
that had only begun are shown beside. The watched steps are all ordinary ones between two that compute thresholds exactly: those
have to wait for the last bucket in any mode. The timeline shows the first of them; the shares are of all.

Two settings, of two ranks with one thread each on one machine. `processor`: backward computes on the cores that select and send
as well, and bytes go through memory. `stand-in for an accelerator`: backward sleeps 20 ms a layer with batches of 8, and the
ranks are in network namespaces with links of 20 Mbit/s. **Nothing here has run on an accelerator.**

Run (as root): python benchmarks/ok_topk_trace.py [--layers N] [--width N]
Writes: benchmarks/results/ok_topk_trace.csv: the events of the timeline's step on both ranks, after the shares.
"""

import argparse
import statistics
from typing import Any

from _ok_topk import real_ranks
from _ok_topk_trace import Event, trace
from _results import write_results

from tests.ranks.hosts import Hosts, why_not

RANKS, MBIT = 2, 20.0
SETTINGS = {
    "processor": {"batch": 512, "pause_s": 0.0},
    "stand-in for an accelerator": {"batch": 8, "pause_s": 0.02},
}
TIMELINE_COLUMNS = 60


def timeline(events: list[Event]) -> list[str]:
    """Return a line per event, with a mark where it stands in the pass."""
    end_s = max(event.end_s for event in events)
    lines = []
    for event in sorted(events, key=lambda event: event.start_s):
        first, last = (int(moment / end_s * (TIMELINE_COLUMNS - 1)) for moment in (event.start_s, event.end_s))
        bar = " " * first + ("|" if event.kind == "gradient" else "=" * (last - first + 1))
        sent = f"{event.sent_bytes:9,d} B" if event.sent_bytes else ""
        lines.append(f"{1e3 * event.start_s:8.1f} {1e3 * event.end_s:8.1f} ms {bar:{TIMELINE_COLUMNS}} {event.name:45} {sent}")
    return lines


def shares(steps: list[list[Event]]) -> dict[str, Any]:
    """Return the bytes of a rank's steps and how many of them had gone before the step's last gradient was there."""
    total, begun, left, gradients_ms, ends_ms = 0, 0, 0, [], []
    for events in steps:
        last_s = max(event.start_s for event in events if event.kind == "gradient")
        total += sum(event.sent_bytes for event in events)
        begun += sum(event.sent_bytes for event in events if event.start_s < last_s)
        left += sum(event.sent_bytes for event in events if event.end_s < last_s)
        gradients_ms.append(1e3 * last_s)
        ends_ms.append(1e3 * max(event.end_s for event in events))
    return {
        "steps": len(steps),
        "sent_bytes": total,
        "bytes_left_before": left,
        "share_left_before": f"{left / total:.3f}",
        "share_begun_before": f"{begun / total:.3f}",
        "last_gradient_ms": f"{statistics.median(gradients_ms):.1f}",
        "last_collective_ms": f"{statistics.median(ends_ms):.1f}",
    }


def main() -> None:
    """Watch both modes, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"{reason}; this benchmark needs hosts of its own")
    rows, summary = [], []
    with real_ranks() as ranks, Hosts(RANKS, bandwidth_bytes_per_s=MBIT * 1e6 / 8) as hosts:
        for name, mode in ((name, mode) for name in SETTINGS for mode in ("streamed", "global")):
            plan = (mode, given.layers, given.width, *SETTINGS[name].values())
            placed = hosts.place(*range(RANKS)) if name != "processor" else None
            per_rank = ranks.run(trace, RANKS, *plan, hosts=placed, timeout_s=300)
            for rank, steps in enumerate(per_rank):
                setting = {"setting": name, "mode": mode, "rank": rank, **vars(given)}
                for event in sorted(steps[0], key=lambda event: event.start_s):
                    times = {"start_ms": f"{1e3 * event.start_s:.2f}", "end_ms": f"{1e3 * event.end_s:.2f}"}
                    sent = event.sent_bytes or None
                    rows.append({**setting, "kind": event.kind, "name": event.name, **times, "sent_bytes": sent})
                summary.append({**setting, "kind": "share", **shares(steps)})
            print(f"\n{name}, mode {mode}, rank 0; | a gradient, = a collective", *timeline(per_rank[0][0]), sep="\n")
    print()
    for row in summary:
        print(
            f"{row['setting']}, {row['mode']}, rank {row['rank']}: of {row['sent_bytes']:,d} bytes in {row['steps']} steps, "
            f"{row['share_left_before']} had left when the last gradient was there, {row['share_begun_before']} in calls begun; "
            f"medians: last gradient at {row['last_gradient_ms']} ms, last collective's end at {row['last_collective_ms']} ms"
        )
    print("wrote", write_results("ok_topk_trace", [*summary, *rows]))


if __name__ == "__main__":
    main()
