"""How long a run stands still after a SIGKILL, until the next training step is done: processes, and a host with its memory.

The net of the recipe ``survive`` in two processes (DDP, gloo, CPU) with MemoryCheckpoint, a capture every ten steps. Goals: 95 of
100 recoveries from a killed process within 5 s, from a lost host within 20 s, counted from when the launcher has noticed.

    lightning run      a YAML, --nproc-per-node=2 --max-restarts=N: torchrun's agent with ranks that are forked from a server that
                       has Lightning imported; a rank that is drawn is killed, a drawn time after all of them train
    torchrun           the same training as a script, under torchrun --standalone --max-restarts=N, killed likewise; ranks that it
                       has started again find the dead ones' addresses (pytorch issue 135712), so that a start may fail, too
    ..., own store     the same with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which avoids that, and which `lightning run` sets
    host lost          `lightning run --nnodes=2` on two network namespaces, one rank each, with a keeper each; all processes of
                       host 1 are killed, its launcher and keeper among them, and it comes back with empty memory: it gets its
                       rank's state from the keeper on host 0. It needs root.
    ..., another joins     with --rdzv-backend=c10d and restarts: host 0's launcher stays, and one is launched on host 1 at once
    ..., all relaunched    with the static rendezvous and without restarts: when host 0's launcher has ended with an error, both
                           are launched anew, as a scheduler does that starts a job again

All is counted from the SIGKILL to the end of the first step after it, so it holds the time until somebody notices, as well: a
tenth of a second for the agent, ``noticed_s`` where all are relaunched. A part lasts until the last rank has come through it:
``begin`` until there are new processes (notice, end the other rank, the agents' rendezvous, starts that fail; for a host also the
launcher), ``imports`` until the callbacks are made, ``meet`` until there is a process group, ``find`` until a state is found,
``step`` until the first step is done. Both hosts share this machine's cores, where each would have its own.

Run: python benchmarks/memory_checkpoint_recovery.py [--kills N] [--torchrun-kills N] [--host-kills N] [--seed S] [--tiny]
Writes: benchmarks/results/memory_checkpoint_recovery.csv.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _keepers import end_keepers, kill, wait_until
from _memory_checkpoint_recovery import CADENCE, EPOCHS, FOLDER, FOUND, MET, REACHED
from _results import write_results

from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, new_secret_file
from lightning_plugins.recipes._seams import SHARED_STORE_VARIABLE
from lightning_plugins.recipes.survive_journal import Tail
from tests.ranks.hosts import Host, Hosts, why_not
from tests.ranks.linux import descendants

HERE = Path(__file__).parent
RANKS = 2
START_WITHIN_S, RECOVERED_WITHIN_S = 90.0, 30.0
TRAINED_S = (0.3, 1.0)  # from when all ranks train to the kill
PARTS = ("begin", "imports", "meet", "find", "step")
LIGHTNING_RUN, TORCHRUN, TORCHRUN_OWN_STORE = "lightning run", "torchrun", "torchrun, own store"
JOINED, RELAUNCHED = "host lost, another joins", "host lost, all relaunched"
VARIABLES = {TORCHRUN_OWN_STORE: {SHARED_STORE_VARIABLE: "1"}}
GOALS = {LIGHTNING_RUN: 5.0, TORCHRUN: None, TORCHRUN_OWN_STORE: None, JOINED: 20.0, RELAUNCHED: 20.0}  # seconds, of 95 of 100
# Else torchrun takes 15 s to see that a host has gone, and keeps its place until then.
KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=3"
STARTS_AT_MOST = 10  # for one kill
YAML = f"""
model:
  class_path: lightning_plugins.recipes.survive_learner.Learner
  init_args: {{processes: {RANKS}, epochs: {EPOCHS}}}
trainer:
  accelerator: cpu
  strategy: ddp
  max_epochs: {EPOCHS}
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {{class_path: _memory_checkpoint_recovery.Marks, init_args: {{reached: {MET}}}}}
    - class_path: lightning_plugins.callbacks.memory_checkpoint.MemoryCheckpoint
      init_args: {{job: recovery, every_n_steps: {CADENCE}, disk_dir: false}}
    - {{class_path: _memory_checkpoint_recovery.Marks, init_args: {{reached: {FOUND}}}}}
"""
LAUNCHER = "import sys; from lightning_plugins.cli import main; sys.exit(main())"


class Launch:
    """The ranks of one launch, as their journals tell.

    Args:
        folder: of the journals.
        launchers: the processes that this benchmark has started.
    """

    def __init__(self, folder: Path, launchers: list["subprocess.Popen[bytes]"]) -> None:
        self.folder, self.launchers = folder, launchers
        self._tails = [Tail(folder / f"rank{rank}.jsonl") for rank in range(RANKS)]
        self._lines: list[list[dict[str, Any]]] = [[] for _ in range(RANKS)]

    def starts(self, since_s: float) -> list[dict[int, list[dict[str, Any]]]]:
        """Return the lines of each rank's processes that were made after a moment, by their pid, the last process last."""
        for lines, tail in zip(self._lines, self._tails, strict=True):
            lines += tail()
        found = []
        for lines in self._lines:
            pids = [line["pid"] for line in lines if line["kind"] == "started" and line["seconds"] > since_s]
            found.append({pid: [line for line in lines if line["pid"] == pid] for pid in pids})
        return found

    def newest(self, what: str, since_s: float = 0.0) -> list[list[dict[str, Any]]]:
        """Return what each rank's last process has written about something."""
        return [[line for line in list(of.values())[-1] if line["kind"] == what] if of else [] for of in self.starts(since_s)]

    def wait_for_steps(self, count: int, since_s: float = 0.0, within_s: float = START_WITHIN_S) -> None:
        """Return when all ranks have been started after a moment and have done so many steps.

        Raises:
            TimeoutError: if they do not.
            RuntimeError: with what the launchers said, if one has ended.
        """
        deadline = time.monotonic() + within_s
        while any(len(lines) < count for lines in self.newest("step", since_s)):
            if any(each.poll() is not None for each in self.launchers):
                logs = self.folder.glob("*.log")
                raise RuntimeError("a launcher has ended:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
            if time.monotonic() > deadline:
                raise TimeoutError(f"the ranks do not train after {within_s:g} s")
            time.sleep(0.005)

    def recovery(self, case: str, killed_s: float, done: int) -> dict[str, Any]:
        """Return the row of what came after a kill."""
        reached = {what: [lines[0]["seconds"] for lines in self.newest(what, killed_s)] for what in REACHED}
        moments = [killed_s, *(max(reached[what]) for what in REACHED)]
        first = min(lines[0]["step"] for lines in self.newest("step", killed_s))
        return {
            "part": "kill",
            "case": case,
            "outcome": "recovered",
            "steps_again": done - (first - 1),
            "starts": max(map(len, self.starts(killed_s))),
            "total_s": moments[-1] - killed_s,
            **{f"{part}_s": moments[i + 1] - moments[i] for i, part in enumerate(PARTS)},
        }

    def done(self) -> int:
        """Return the steps that all ranks have done."""
        return min(lines[-1]["step"] for lines in self.newest("step"))

    def end(self) -> None:
        """End all of it; a keeper is no descendant."""
        for each in self.launchers:
            kill_but_trackers([each.pid, *descendants(each.pid)])
            each.wait()


@contextmanager
def launched(folder: Path, commands: list[list[str]], environments: list[dict[str, str]]) -> Iterator[Launch]:
    """Start launchers, and leave nothing of them after the block."""
    folder.mkdir()
    launch = Launch(folder, [])
    try:
        for number, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            launch.launchers.append(start(folder, number, command, environment))
        yield launch
    finally:
        launch.end()


def start(folder: Path, number: int, command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start one launcher, whose ranks write to a folder."""
    own = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", FOLDER: str(folder), **environment}
    with (folder / f"{number}.log").open("ab") as log:
        return subprocess.Popen(command, env=own, stdout=log, stderr=log, cwd=folder, start_new_session=True)


def lightning_run(folder: Path, *options: str) -> list[str]:
    """Return a command line of `lightning run` for the YAML."""
    yaml = folder / "recovery.yaml"
    yaml.write_text(YAML)
    return [sys.executable, "-c", LAUNCHER, "run", str(yaml), f"--runs-dir={folder / 'runs'}", *options]


def cases(case: str, kills: int, folder: Path, generator: random.Random) -> Iterator[dict[str, Any]]:
    """Yield the rows of a case."""
    if kills and case in (JOINED, RELAUNCHED):
        with hosts(folder) as (made, environments):
            yield from (host_joins if case == JOINED else hosts_relaunched)(kills, folder, made, environments, generator)
    elif kills:
        yield from processes_killed(case, kills, folder, generator)


def processes_killed(case: str, kills: int, folder: Path, generator: random.Random) -> Iterator[dict[str, Any]]:
    """Yield a row for every SIGKILL of one rank."""
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    options = [f"--nproc-per-node={RANKS}", f"--max-restarts={kills * STARTS_AT_MOST}"]
    own = {"XDG_RUNTIME_DIR": str(runtime)}
    if case == LIGHTNING_RUN:
        command = lightning_run(folder, *options)
    else:
        script = [str(HERE / "_memory_checkpoint_recovery.py"), str(RANKS), "recovery"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, *script]
    hits = 0
    try:
        while hits < kills:
            with launched(folder / f"launch{hits}", [command], [own | VARIABLES.get(case, {})]) as launch:
                launch.wait_for_steps(2 * CADENCE)
                while hits < kills:
                    hits += 1
                    time.sleep(generator.uniform(*TRAINED_S))
                    victim = launch.newest("started")[generator.randrange(RANKS)][0]["pid"]
                    killed_s = time.monotonic()
                    kill([victim])
                    done = launch.done()
                    try:
                        launch.wait_for_steps(1, killed_s, RECOVERED_WITHIN_S)
                    except TimeoutError:
                        yield {"part": "kill", "case": case, "total_s": "", "outcome": f"none within {RECOVERED_WITHIN_S:g} s"}
                        break
                    yield launch.recovery(case, killed_s, done)
            end_keepers(runtime)  # what follows is another run
    finally:
        end_keepers(runtime)


@contextmanager
def hosts(folder: Path) -> Iterator[tuple[Hosts, list[dict[str, str]]]]:
    """Make two hosts, and what launchers on them have in their environment: a folder for a keeper, and the job's secret."""
    new_secret_file(folder / "secret")
    runtimes = [folder / f"runtime{number}" for number in range(RANKS)]
    for runtime in runtimes:
        runtime.mkdir(mode=0o700)
    with Hosts(RANKS) as made:
        try:
            yield made, [{"XDG_RUNTIME_DIR": str(runtime), FILE_VARIABLE: str(folder / "secret")} for runtime in runtimes]
        finally:
            for runtime in runtimes:
                end_keepers(runtime)


def host_joins(
    kills: int, folder: Path, made: Hosts, environments: list[dict[str, str]], generator: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield a row for every loss of host 1; host 0's launcher stays, and a new one joins it."""
    meeting = [f"--rdzv-endpoint={made.hosts[0].address}:29500", "--rdzv-id=joined", f"--max-restarts={kills * STARTS_AT_MOST}"]
    commands = []
    for number, host in enumerate(made.hosts):
        # All hosts here have one name: what torchrun would find out by it has to be said.
        own = [f"--local-addr={host.address}", f"--rdzv-conf=is_host={int(not number)},{KEEP_ALIVE}"]
        commands.append(on_host(host, folder, *meeting, *own))
    with launched(folder / "launch", commands, environments) as launch:
        launch.wait_for_steps(2 * CADENCE)
        for number in range(kills):
            time.sleep(generator.uniform(*TRAINED_S))
            done, killed_s = launch.done(), time.monotonic()
            kill_but_trackers(inside(made.hosts[1]))
            launch.launchers[1].wait()
            launch.launchers[1] = start(launch.folder, RANKS + number, commands[1], environments[1])
            launch.wait_for_steps(1, killed_s)
            yield launch.recovery(JOINED, killed_s, done)


def hosts_relaunched(
    kills: int, folder: Path, made: Hosts, environments: list[dict[str, str]], generator: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield a row for every loss of host 1; both launchers are started anew when host 0's has ended with an error."""
    killed_s, noticed_s, done = 0.0, 0.0, 0
    for number in range(kills + 1):
        meeting = [f"--master-addr={made.hosts[0].address}", f"--master-port={29500 + number}", f"--rdzv-id=r{number}"]
        commands = [on_host(host, folder, f"--node-rank={rank}", *meeting) for rank, host in enumerate(made.hosts)]
        with launched(folder / f"launch{number}", commands, environments) as launch:
            launch.wait_for_steps(2 * CADENCE if number < kills else 1)
            if number:
                yield {**launch.recovery(RELAUNCHED, killed_s, done), "noticed_s": noticed_s - killed_s}
            if number < kills:
                time.sleep(generator.uniform(*TRAINED_S))
                done, killed_s = launch.done(), time.monotonic()
                kill_but_trackers(inside(made.hosts[1]))
                launch.launchers[0].wait(START_WITHIN_S)
                noticed_s = time.monotonic()


def on_host(host: Host, folder: Path, *options: str) -> list[str]:
    """Return the command line of one host's launcher."""
    words = lightning_run(folder, "--nproc-per-node=1", f"--nnodes={RANKS}", *options)
    return ["ip", "netns", "exec", host.name, "env", f"GLOO_SOCKET_IFNAME={host.interface}", *words]


def inside(host: Host) -> list[int]:
    """Return the processes of a host."""
    listed = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


def kill_but_trackers(pids: list[int]) -> None:
    """SIGKILL processes, but not those that remove Python's semaphores from /dev/shm when the others have gone, and then end."""
    trackers = [pid for pid in pids if is_tracker(pid)]
    kill([pid for pid in pids if pid not in trackers])
    wait_until(lambda: not any(map(is_tracker, trackers)))


def is_tracker(pid: int) -> bool:
    """Tell whether a process is Python's tracker of resources."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a case, and one a goal."""
    found, goals = [], []
    for case, goal in GOALS.items():
        all_kills = [row for row in rows if row["case"] == case]
        own = [row for row in all_kills if row["outcome"] == "recovered"]
        row = {"part": "case", "case": case, "kills": len(all_kills), "recovered": len(own)}
        if not own:
            found += [row] if all_kills else []
            continue
        p95_s = float(np.percentile([row["total_s"] for row in own], 95))
        found.append(
            {
                **row,
                "p50_s": statistics.median(row["total_s"] for row in own),
                "p95_s": p95_s,
                "max_s": max(row["total_s"] for row in own),
                **{f"{part}_s": statistics.median(row[f"{part}_s"] for row in own) for part in PARTS},
                **({"noticed_s": statistics.median(row["noticed_s"] for row in own)} if "noticed_s" in own[0] else {}),
                "starts_median": statistics.median(row["starts"] for row in own),
                "steps_again_median": statistics.median(row["steps_again"] for row in own),
            }
        )
        if goal is not None:
            verdict = "held" if p95_s <= goal and len(own) == len(all_kills) else "MISSED"
            goals.append({"part": "goal", "case": case, "p95_s": p95_s, "goal": f"p95 <= {goal:g} s", "verdict": verdict})
    return [*found, *goals]


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    columns = (
        "kills",
        "recovered",
        "p50_s",
        "p95_s",
        "max_s",
        *(f"{part}_s" for part in PARTS),
        "starts_median",
        "steps_again_median",
    )
    line = "{:24} {:>5} {:>9}" + " {:>9}" * 8 + " {:>13} {:>18}"
    print(line.format("", *columns))
    for row in rows:
        if row["part"] == "case":
            print(line.format(row["case"], *(rounded(row.get(name, "")) for name in columns)))
        else:
            print(f"{row['case']}: {row['goal']}, {row['verdict']}: {rounded(row['p95_s'])} s")


def rounded(value: Any) -> str:
    """Return seconds to the hundredth."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Kill, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of a process, under `lightning run`")
    parser.add_argument("--torchrun-kills", type=int, default=3, help="under torchrun, each of twice")
    parser.add_argument("--host-kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="try it out: one kill under `lightning run`, nothing is written")
    given = parser.parse_args()
    torchrun_kills, host_kills = (0, 0) if given.tiny else (given.torchrun_kills, given.host_kills)
    counts = {LIGHTNING_RUN: 1 if given.tiny else given.kills, TORCHRUN: torchrun_kills, TORCHRUN_OWN_STORE: torchrun_kills}
    if host_kills and (reason := why_not()):
        print(f"no host is lost: {reason}")
        host_kills = 0
    counts |= {JOINED: host_kills, RELAUNCHED: host_kills}
    generator, rows = random.Random(given.seed), []
    for case, kills in counts.items():
        start_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                for row in cases(case, kills, Path(scratch), generator):
                    rows.append(row)
                    print(f"{case}: {row['outcome']} {rounded(row['total_s'])}", flush=True)
            except TimeoutError as error:
                rows.append({"part": "kill", "case": case, "outcome": str(error)})
                print(f"{case}: {error}", flush=True)
        print(f"{case}: {time.perf_counter() - start_s:.0f} s", flush=True)
    report(summary(rows))
    if not given.tiny:
        printed = [{name: rounded(value) for name, value in row.items()} for row in [*summary(rows), *rows]]
        print("wrote", write_results("memory_checkpoint_recovery", printed))


if __name__ == "__main__":
    main()
