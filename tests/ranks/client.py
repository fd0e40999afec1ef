"""The test's side of the ranks: start them, act on them while they run, wait for them, read what they returned.

    values = ranks.run(function, 4)                      # function(rank, world_size) in 4 gloo processes
    with ranks.start(function, 4) as handle:             # the same, and the test goes on beside them
        handle.wait_for("step 3")
        handle.kill_at(2, seconds=0.05)
        assert handle.join(30) == [1, 1, -9, 1]

The handle talks to its supervisor only inside its own methods: no thread runs in the test's process.
"""

import os
import pickle
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.ranks import linux
from tests.ranks.hosts import Host
from tests.ranks.rank import STACKS_SIGNAL, output_file, stacks_file
from tests.ranks.wire import Channel

OUTPUT_CHARACTERS = 3000
AFTER_FAILURE_S = 2.0  # how long `run` lets the other ranks find out about a failed one before it ends them


class RankFailure(RuntimeError):
    """A rank raised, was killed, or ended without returning; the message holds its traceback and its last output."""


class RankTimeout(TimeoutError):
    """Ranks were still running; the message holds their stacks."""


def kill_times(seed: int, world_size: int, within_s: float) -> Iterator[tuple[int, float]]:
    """Draw kills without end: a rank and the seconds until it dies, uniform in ``[0, within_s)``; the same for the same seed."""
    generator = random.Random(seed)
    while True:
        yield generator.randrange(world_size), generator.uniform(0, within_s)


class Ranks:
    """Starts ranks through a server.

    Args:
        address: the server's Unix socket.
        root: the folder that holds ``tests`` and ``lightning_plugins``; ranks import both from there, and work in it.
    """

    def __init__(self, address: str, root: Path) -> None:
        self.address = address
        self.root = root

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        backend: str = "gloo",
        hosts: Sequence[Host] | None = None,
        timeout_s: float = 60,
        init: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Call ``function(rank, world_size, *args)`` in ``world_size`` processes and return what each rank returned.

        No process of the job is left when this returns or raises.

        Args:
            function: a function at the top level of a test module; it and ``args`` travel as pickles, results back likewise.
            backend: of the default process group.
            hosts: one host a rank, such as ``hosts.place(0, 0, 1, 1)``; None leaves all ranks on this machine's loopback.
            timeout_s: for the whole job, and for each collective of the group.
            init: whether to make the default process group; the variables of torchrun are set in any case.
            env: variables set in every rank before ``function`` is imported or called.

        Raises:
            RankFailure: if a rank failed; the others are given two seconds to end by themselves.
            RankTimeout: if ranks are still running after ``timeout_s``.
        """
        with self.start(
            function, world_size, *args, backend=backend, hosts=hosts, timeout_s=timeout_s, init=init, env=env
        ) as handle:
            handle.join(timeout_s, until_failure=True)
            return handle.results()

    def start(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        backend: str = "gloo",
        hosts: Sequence[Host] | None = None,
        timeout_s: float = 60,
        init: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> "Handle":
        """Start ranks as ``run`` does and return at once; use the handle in a ``with`` block, whose end ends all processes.

        Raises:
            ValueError: if ``world_size`` is not positive, ``hosts`` does not name one host a rank, or ``function`` is nested.
        """
        if world_size < 1:
            raise ValueError(f"world_size must be 1 or more, got {world_size}")
        if hosts is not None and len(hosts) != world_size:
            raise ValueError(f"hosts must name one host for each of the {world_size} ranks, got {len(hosts)}")
        if "<" in function.__qualname__:
            raise ValueError(
                f"{function.__qualname__} cannot be found by another process; move it to the top level of its module"
            )
        job = {
            "call": pickle.dumps((function, args)),
            "world_size": world_size,
            "backend": backend,
            "hosts": None if hosts is None else list(hosts),
            "timeout_s": timeout_s,
            "init": init,
            "env": dict(env or {}),
            "server": self.address,
        }
        return Handle(self._connect(), job)

    def at(self, root: Path) -> "Ranks":
        """Return the same with another root, such as a mutated copy of the repository."""
        return Ranks(self.address, root)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self.address)
        here = str(Path(__file__).parents[2])
        path = [str(self.root), *map(os.path.abspath, sys.path)]
        if str(self.root) != here:
            path = [entry for entry in path if entry != here]
        request = "\0".join([*path, str(self.root)]).encode()
        connection.sendall(len(request).to_bytes(8, "big") + request)
        return connection


class Handle:
    """Ranks that are running.

    Attributes:
        pids: process number of each rank.
        messages: ``(rank, value, monotonic seconds)`` of every ``progress(value)`` received so far.
        signals: ``(rank, signal number, monotonic seconds)`` of every signal that reached a living rank.
    """

    def __init__(self, connection: socket.socket, job: dict[str, Any]) -> None:
        self.world_size: int = job["world_size"]
        self.pids: list[int] = []
        self.messages: list[tuple[int, Any, float]] = []
        self.signals: list[tuple[int, int, float]] = []
        self._results: dict[int, bytes] = {}
        self._errors: dict[int, str] = {}  # in the order in which they came
        self._codes: dict[int, int] = {}  # likewise
        self._refusal = ""
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        self._channel = Channel(connection)
        self._send({**job, "folder": self._folder})

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def kill(self, rank: int) -> None:
        """SIGKILL a rank."""
        self._signal(rank, signal.SIGKILL)

    def kill_at(self, rank: int, seconds: float) -> None:
        """SIGKILL a rank ``seconds`` from now, by the supervisor's clock; nothing happens if it has ended by then."""
        self._signal(rank, signal.SIGKILL, seconds)

    def terminate(self, rank: int) -> None:
        """SIGTERM a rank."""
        self._signal(rank, signal.SIGTERM)

    def stop(self, rank: int) -> None:
        """SIGSTOP a rank: it hangs until ``cont``."""
        self._signal(rank, signal.SIGSTOP)

    def cont(self, rank: int) -> None:
        """SIGCONT a rank."""
        self._signal(rank, signal.SIGCONT)

    @property
    def exit_codes(self) -> list[int | None]:
        """Exit code of each rank: None while it runs, minus the signal's number if one killed it."""
        self._pump(0)
        return [self._codes.get(rank) for rank in range(self.world_size)]

    def wait_for(self, value: Any, ranks: Sequence[int] | None = None, timeout_s: float = 30) -> None:
        """Wait until each of ``ranks`` (default: all) has called ``progress`` with an equal value.

        Raises:
            RankFailure: if one of them ended without.
            RankTimeout: after ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        wanted = set(range(self.world_size) if ranks is None else ranks)
        while missing := wanted - {rank for rank, seen, _ in self.messages if seen == value}:
            if missing & set(self._codes):
                raise RankFailure(f"a rank ended before its progress({value!r})\n{self._report()}")
            self._pump_before(deadline, f"progress({value!r}) of rank {sorted(missing)}")

    def join(self, timeout_s: float, ranks: Sequence[int] | None = None, until_failure: bool = False) -> list[int | None]:
        """Wait until ranks have ended and return the exit codes of all; a killed or failed rank is no error here.

        Args:
            timeout_s: how long to wait.
            ranks: whom to wait for; None means all.
            until_failure: give up on the others two seconds after the first rank has failed.

        Raises:
            RankTimeout: after ``timeout_s``; the message holds the stacks of those that still run.
        """
        deadline = time.monotonic() + timeout_s
        failed_at = None
        wanted = set(range(self.world_size) if ranks is None else ranks)
        while running := sorted(wanted - set(self._codes)):
            if until_failure and failed_at is None and (self._errors or any(self._codes.values())):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + AFTER_FAILURE_S:
                break
            self._pump_before(deadline, f"the end of ranks {running} of {self.world_size}", at_most_s=0.1 if failed_at else 1.0)
        return self.exit_codes

    def results(self) -> list[Any]:
        """Return what each rank returned.

        Raises:
            RankFailure: if a rank returned nothing, because it raised, was killed, exited early or still runs.
        """
        self._pump(0)
        failed = len(self._results) < self.world_size or any(self._codes.get(rank) != 0 for rank in range(self.world_size))
        if failed:
            raise RankFailure(self._report())
        return [pickle.loads(self._results[rank]) for rank in range(self.world_size)]

    def result(self, rank: int) -> Any:
        """Return what one rank returned, when others were meant to fail.

        Raises:
            RankFailure: if it returned nothing.
        """
        self._pump(0)
        if rank not in self._results:
            raise RankFailure(self._report())
        return pickle.loads(self._results[rank])

    def error(self, rank: int) -> str:
        """Return the traceback of a rank that raised, else ``""``."""
        self._pump(0)
        return self._errors.get(rank, "")

    def output(self, rank: int) -> str:
        """Return what a rank has printed so far, standard error included."""
        return _read(output_file(self._folder, rank))

    def close(self) -> None:
        """End all processes of the job, and return when the last is gone."""
        if self._channel.socket.fileno() < 0:
            return
        self._send(("close",))
        while not self._channel.closed:
            self._pump(1.0)
        self._channel.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # the supervisor's work, unless it never got the job

    def _signal(self, rank: int, number: int, delay_s: float = 0.0) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be 0 to {self.world_size - 1}, got {rank}")
        self._send(("signal", rank, int(number), delay_s))

    def _send(self, message: Any) -> None:
        """Send at once and whole: the test may do other things for a long time afterwards."""
        self._channel.send(message)
        while self._channel.unsent:
            self._pump(1.0)

    def _pump_before(self, deadline: float, waited_for: str, at_most_s: float = 1.0) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise RankTimeout(f"timed out waiting for {waited_for}\n{self._stacks()}")
        if self._channel.closed:
            raise RankFailure(f"the supervisor ended while the test waited for {waited_for}\n{self._report()}")
        self._pump(min(left_s, at_most_s))

    def _pump(self, wait_s: float) -> None:
        if self._channel.socket.fileno() < 0:
            return
        select.select([self._channel], [self._channel] if self._channel.unsent else [], [], wait_s)
        self._channel.flush()
        for kind, *rest in self._channel.receive():
            if kind == "started":
                (self.pids,) = rest
            elif kind == "refused":
                (self._refusal,) = rest
            elif kind == "progress":
                rank, value, time_s = rest
                self.messages.append((rank, pickle.loads(value), time_s))
            elif kind == "signalled":
                rank, number, time_s = rest
                self.signals.append((rank, number, time_s))
            elif kind == "result":
                rank, self._results[rank] = rest
            elif kind == "error":
                rank, self._errors[rank] = rest
            elif kind == "ended":
                rank, self._codes[rank], _ = rest
        if self._refusal:
            raise RankFailure(f"the ranks could not be started\n{self._refusal}")

    def _report(self) -> str:
        """Say what became of each rank: first those that raised, in the order in which they did."""
        lines = []
        for rank in [*self._errors, *(rank for rank in range(self.world_size) if rank not in self._errors)]:
            if rank in self._errors:
                lines.append(f"rank {rank} of {self.world_size} raised\n{self._errors[rank]}")
            elif self._codes.get(rank, 0) < 0:
                lines.append(f"rank {rank} of {self.world_size} was killed by {_signal_name(-self._codes[rank])}")
            elif rank in self._codes:
                returned = "returned" if rank in self._results else "did not return"
                lines.append(f"rank {rank} of {self.world_size} {returned} and ended with exit code {self._codes[rank]}")
            else:
                lines.append(f"rank {rank} of {self.world_size} was still running")
            if self._codes.get(rank) != 0 and (printed := _without_modules(self.output(rank)).strip()):
                lines.append(f"--- last output of rank {rank}\n{printed[-OUTPUT_CHARACTERS:]}")
        return "\n".join(lines)

    def _stacks(self) -> str:
        """Return the report, with the stacks of the ranks that still run."""
        running = [rank for rank in range(self.world_size) if rank not in self._codes]
        if not self.pids:
            return "the ranks had not been forked yet: importing the function's module takes too long"
        stopped = [rank for rank in running if linux.state(self.pids[rank]) == "T"]
        for rank in set(running) - set(stopped):
            self._signal(rank, STACKS_SIGNAL)
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not all(self._stack(rank) for rank in set(running) - set(stopped)):
            self._pump(0.05)
        time.sleep(0.05)  # the dump is written line by line
        lines = [self._report()]
        for rank in running:
            stack = "(stopped by SIGSTOP)" if rank in stopped else self._stack(rank) or "(no stack: it does not take signals)"
            lines.append(f"--- stack of rank {rank}\n{stack}")
        return "\n".join(lines)

    def _stack(self, rank: int) -> str:
        return _read(stacks_file(self._folder, rank)).strip()


def _signal_name(number: int) -> str:
    """Name a signal; those between SIGRTMIN and SIGRTMAX have none of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number} (SIGRTMIN + {number - signal.SIGRTMIN})"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _without_modules(text: str) -> str:
    """Leave out the list of all extension modules that a process writes when a signal ends it: it hides what went before."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("Extension modules: "))
