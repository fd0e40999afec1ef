"""The forkserver: one process a test session that has torch and Lightning imported and forks every job from itself.

Run as ``python -m tests.ranks.server SOCKET``. It imports what costs seconds, forgets our own package again, listens on the
Unix socket and forks a supervisor for each connection; the supervisor imports ``tests`` and ``lightning_plugins`` afresh, from
the requester's ``sys.path``. So a job costs milliseconds, sees today's files, and may even ask for a mutated copy of them.
The server ends when its standard input does, that is, with the process that started it, whatever ended that.
"""

import gc
import os
import select
import shutil
import signal
import socket
import sys
import traceback
from importlib import import_module

OURS = ("lightning_plugins", "tests")


def preload() -> None:
    """Import what every job needs, in the Lightning that LIGHTNING_PLUGINS_NAMESPACE names, and keep nothing of our own."""
    import hypothesis  # noqa: F401 (pytest and this for mutations, whose tests run in ranks)
    import pytest  # noqa: F401
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    import_module("lightning_plugins._lightning")
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]


def serve(address: str) -> None:
    """Accept jobs until the owner is gone."""
    preload()
    gc.collect()
    gc.freeze()  # a fork whose collector walks this heap would copy all of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors need no reaping
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen()
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            shutil.rmtree(os.path.dirname(address), ignore_errors=True)  # the owner's work, if it was not killed
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                begin(connection)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        connection.close()


def begin(connection: socket.socket) -> None:
    """Read the requester's import path, then hand over to the supervisor that is found there, which does not return."""
    length = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    if length == 0:  # somebody only asked whether the server listens
        os._exit(0)
    *path, root = connection.recv(length, socket.MSG_WAITALL).decode().split("\0")
    sys.path[:] = path
    os.chdir(root)
    import_module("tests.ranks.supervisor").supervise(connection)


if __name__ == "__main__":
    serve(sys.argv[1])
