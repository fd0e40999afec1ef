"""One job's supervisor: forks the ranks and their store, passes messages on, sends signals when told, and leaves nothing behind.

It is forked from the server, adopts every orphan of its ranks, and lives until the test closes its handle or dies. Then it
SIGKILLs all its descendants (a daemon that a rank started in a session of its own included) and removes the job's folder.
Signals are sent from here, because only the parent of a process knows that its number has not been given to another one.
"""

import heapq
import os
import pickle
import selectors
import shutil
import signal
import socket
import time
import traceback
from functools import partial
from typing import Any, NoReturn

from tests.ranks import linux, rank
from tests.ranks.wire import Channel


def supervise(connection: socket.socket) -> NoReturn:
    """Run the one job that comes over ``connection``, and end this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    linux.adopt_orphans()
    _Supervisor(Channel(connection)).run()
    os._exit(0)  # the socket stays open until the process is really gone: its end tells the test so


class _Supervisor:
    def __init__(self, client: Channel) -> None:
        self.client = client
        self.ranks: list[Channel] = []
        self.pids: dict[int, int] = {}  # living rank's process number -> rank
        self.timers: list[tuple[float, int, int]] = []  # monotonic seconds, rank, signal number
        self.folder = ""
        self.closing = False
        # SIGCHLD only wakes the loop: reaping in one place keeps numbers valid until their signal is sent.
        self.awake, self.waker = socket.socketpair()
        self.awake.setblocking(False)
        self.waker.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.client, selectors.EVENT_READ)
        self.selector.register(self.awake, selectors.EVENT_READ)

    def run(self) -> None:
        job = self._await_job()
        if job is not None:
            try:
                self._fork_all(job)
            except Exception:
                self.client.send(("refused", traceback.format_exc()))
            while not (self.closing or self.client.closed):
                self._turn()
        self._kill_all()

    def _await_job(self) -> dict[str, Any] | None:
        while not self.client.closed:
            self.selector.select()
            if received := self.client.receive():
                job, *commands = received
                self._obey(commands)  # what a quick test has sent right behind it
                return job
        return None

    def _fork_all(self, job: dict[str, Any]) -> None:
        self.folder = job["folder"]
        function, arguments = pickle.loads(job["call"])
        port_reader, port_writer = os.pipe()
        if os.fork() == 0:
            self._let_go()
            rank.leave(partial(rank.serve_store, job, port_writer))
        os.close(port_writer)
        port = int(os.read(port_reader, 16) or b"0")
        os.close(port_reader)
        if port == 0:
            raise RuntimeError("the rendezvous store of this job did not start; its error stands in the server's output")
        for number in range(job["world_size"]):
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                ours.close()
                self._let_go()
                rank.leave(partial(rank.main, job, number, port, function, arguments, theirs))
            theirs.close()
            self.pids[pid] = number
            self.ranks.append(Channel(ours))
            self.selector.register(self.ranks[-1], selectors.EVENT_READ)
        self.client.send(("started", [pid for pid, _ in sorted(self.pids.items(), key=lambda item: item[1])]))

    def _let_go(self) -> None:
        """Close in a forked child what belongs to the supervisor."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for channel in (self.client, *self.ranks):
            channel.socket.close()
        self.awake.close()
        self.waker.close()

    def _turn(self) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.client.unsent else 0)
        self.selector.modify(self.client, wanted)
        wait_s = max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else None
        ready = {key.fileobj for key, _ in self.selector.select(wait_s)}
        while self.timers and self.timers[0][0] <= time.monotonic():
            _, number, signal_number = heapq.heappop(self.timers)
            self._signal(number, signal_number)
        for number, channel in enumerate(self.ranks):
            if channel in ready:
                self._forward(number)
        if self.awake in ready:
            self._reap()
        self.client.flush()
        self._obey(self.client.receive())

    def _obey(self, commands: list[Any]) -> None:
        for command, *arguments in commands:
            if command == "close":
                self.closing = True
            else:
                number, signal_number, delay_s = arguments
                heapq.heappush(self.timers, (time.monotonic() + delay_s, number, signal_number))

    def _signal(self, number: int, signal_number: int) -> None:
        for pid, living in self.pids.items():
            if living == number:
                os.kill(pid, signal_number)
                self.client.send(("signalled", number, signal_number, time.monotonic()))

    def _forward(self, number: int) -> None:
        channel = self.ranks[number]
        for kind, *rest in channel.receive():
            self.client.send((kind, number, *rest))
        if channel.closed and channel.socket.fileno() >= 0:
            self.selector.unregister(channel)
            channel.socket.close()

    def _reap(self) -> None:
        try:
            while self.awake.recv(4096):
                pass
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.pids:
                number = self.pids.pop(pid)
                self._forward(number)
                self.client.send(("ended", number, os.waitstatus_to_exitcode(status), time.monotonic()))

    def _kill_all(self) -> None:
        while True:
            for pid in linux.descendants(os.getpid()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
