"""What one forked rank does: find its place (host, variables, output), join its group, call the test's function, report."""

import atexit
import faulthandler
import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

from tests.ranks import linux
from tests.ranks.wire import pack

# A real-time signal, since Lightning, torchrun and SLURM have uses for SIGUSR1 and SIGUSR2.
STACKS_SIGNAL = signal.SIGRTMIN + 7
SERVER_VARIABLE = "LIGHTNING_PLUGINS_RANKS_SERVER"

_supervisor: socket.socket | None = None
_sending = threading.Lock()


def progress(value: Any) -> None:
    """Tell the test, from inside a rank, where this rank is; from any thread, and it never waits for the test.

    Args:
        value: anything picklable; ``Handle.wait_for(value)`` waits for an equal one.

    Raises:
        RuntimeError: outside of a rank.
    """
    if _supervisor is None:
        raise RuntimeError(
            "progress() was called outside of a rank; only a function started by ranks.start or ranks.run may call it"
        )
    _send("progress", pickle.dumps(value), time.monotonic())


def _send(*message: Any) -> None:
    assert _supervisor is not None
    with _sending:
        _supervisor.sendall(pack(message))


def output_file(folder: str, number: int) -> str:
    """Return the file that holds what a rank prints."""
    return os.path.join(folder, f"rank{number}.out")


def stacks_file(folder: str, number: int) -> str:
    """Return the file into which a rank writes its stacks at ``STACKS_SIGNAL``."""
    return os.path.join(folder, f"rank{number}.stacks")


def environment(job: dict[str, Any], number: int, port: int) -> dict[str, str]:
    """Return torchrun's variables for a rank, so that a Trainer or ``init_method="env://"`` finds its place by itself.

    Each of the test's hosts is a node; without hosts all ranks are on one node. The store is served by a process of its own
    (which torch knows as the agent's store), so that it outlives rank 0 and its port is never given to anyone else.
    """
    hosts = job["hosts"]
    nodes = [host.name for host in hosts] if hosts else [""] * job["world_size"]
    order = list(dict.fromkeys(nodes))
    variables = {
        "RANK": number,
        "WORLD_SIZE": job["world_size"],
        "LOCAL_RANK": nodes[:number].count(nodes[number]),
        "LOCAL_WORLD_SIZE": nodes.count(nodes[number]),
        "GROUP_RANK": order.index(nodes[number]),
        "GROUP_WORLD_SIZE": len(order),
        "ROLE_RANK": number,
        "ROLE_WORLD_SIZE": job["world_size"],
        "MASTER_ADDR": hosts[0].switch_address if hosts else "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": os.path.basename(job["folder"]),
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "GLOO_SOCKET_IFNAME": hosts[number].interface if hosts else "lo",
        SERVER_VARIABLE: job["server"],
    }
    return {name: str(value) for name, value in variables.items()}


def serve_store(job: dict[str, Any], port_writer: int) -> int:
    """Serve the job's rendezvous store until killed, on the switch between the hosts if there are any."""
    import torch.distributed as dist

    linux.die_with_parent()
    if job["hosts"]:
        linux.enter_network_namespace(job["hosts"][0].switch)
    address = job["hosts"][0].switch_address if job["hosts"] else "127.0.0.1"
    store = dist.TCPStore(address, 0, None, True, wait_for_workers=False)
    os.write(port_writer, str(store.port).encode())
    os.close(port_writer)
    while True:
        signal.pause()


def leave(task: Callable[[], int]) -> NoReturn:
    """Run a forked process's task and end the process as Python does, with its exit handlers, but without taking the modules
    apart: that touches, and so copies, the whole heap that was inherited (two seconds with torch)."""
    try:
        code = task()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # What multiprocessing does in its own forks: wait for threads that are not daemons, then run the handlers.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(
    job: dict[str, Any],
    number: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    connection: socket.socket,
) -> int:
    """Be rank ``number``; return the exit code."""
    global _supervisor
    _supervisor = connection
    linux.die_with_parent()
    _redirect_output(job["folder"], number)
    os.environ.update(environment(job, number, port))
    os.environ.update(job["env"])
    try:
        if job["hosts"]:
            linux.enter_network_namespace(job["hosts"][number].name)
        result = _call(job, number, function, arguments)
        _send("result", pickle.dumps(result))
        return 0
    except Exception:
        _send("error", traceback.format_exc())
        return 1


def _redirect_output(folder: str, number: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(output_file(folder, number), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(file=2)
    faulthandler.register(STACKS_SIGNAL, file=open(stacks_file(folder, number), "w"), all_threads=True)  # noqa: SIM115


def _call(job: dict[str, Any], number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import numpy
    import torch
    import torch.distributed as dist

    # Torch renews its pool of threads when a forked process first asks for it. Several threads of autograd at once race for that,
    # and one that finds no pool aborts the process, so it is asked for here.
    torch.set_num_threads(torch.get_num_threads())
    random.seed()
    numpy.random.seed()  # noqa: NPY002 (what a process of its own would have: ranks do not share the server's generators)
    if job["init"]:
        dist.init_process_group(job["backend"], init_method="env://", timeout=timedelta(seconds=job["timeout_s"]))
    # The group is not destroyed: the process ends next, and gloo of torch 2.6 can wait forever there for a rank that has gone.
    return function(number, job["world_size"], *arguments)
