"""Start the server for a test session, or find the one of the session we are nested in."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ranks.client import Ranks
from tests.ranks.linux import OWNER_VARIABLE
from tests.ranks.rank import SERVER_VARIABLE

START_S = 120.0


@contextmanager
def rank_server(root: Path) -> Iterator[Ranks]:
    """Yield a client of a server that lives for the length of the block.

    A test that itself runs in a rank (the mutations do) shares the outer session's server: it imports nothing of ours, so a
    mutated copy is as fresh there as in one of its own.

    Args:
        root: the folder that holds ``tests`` and ``lightning_plugins``.

    Raises:
        RuntimeError: if the server does not start.
    """
    if SERVER_VARIABLE in os.environ:
        yield Ranks(os.environ[SERVER_VARIABLE], root)
        return
    folder = tempfile.mkdtemp(prefix="rank-server-")
    address = os.path.join(folder, "socket")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", OWNER_VARIABLE: str(os.getpid())}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with open(os.path.join(folder, "errors"), "w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.server", address],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is the test's; the server goes when its standard input ends
        )
        try:
            _wait_until_it_listens(process, address, errors.name)
            yield Ranks(address, root)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", address: str, errors: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(address)
                return
            except OSError:
                time.sleep(0.02)
    raise RuntimeError(f"the rank server did not start within {START_S:.0f} s\n{Path(errors).read_text()}")
