"""Starting a target: in this process, in torchrun's elastic agent, or, for a user's own script, in a child process.

Several ranks are the business of torchrun's agent (rendezvous, restarts, signals), started with torchrun's own options. The
ranks of a recipe or a YAML are forked from a server that has Lightning imported already, since importing it takes each of them
about 5 s otherwise. A rank's exception comes back through the agent's error files; an `InputError` stays one sentence.
"""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from lightning_plugins._support.errors import InputError, RankError, as_input_error, one_line
from lightning_plugins._support.namespace import NAMESPACES, VARIABLE
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes import _seams
from lightning_plugins.recipes.targets import Target, call_target
from lightning_plugins.recipes.world_size import LAUNCHED

_YAML_MODULE = "lightning_plugins.recipes.lightning_cli"
_MEETING_OPTIONS = ("--rdzv-endpoint=", "--master-addr=")


def run_function(target: Target, options: list[str], folder: RunFolder, resume: bool, launch: list[str], debug: bool) -> None:
    """Run a recipe or a YAML, in this process or on the ranks that ``launch`` asks for.

    Args:
        target: the recipe or YAML.
        options: its options.
        folder: the run folder, made by the caller.
        resume: go on with an earlier run.
        launch: torchrun's options; empty for one process.
        debug: let the agent log.

    Raises:
        InputError: what the target or a rank refused, or a wrong launch option.
        RankError: if a rank raised anything else.
        SystemExit: if a signal ended it, with 128 + its number.
    """
    if not launch:
        call_target(target, options, folder, resume)
        return
    namespace = os.environ.get(VARIABLE, NAMESPACES[0])
    _announce(launch)
    multiprocessing.set_forkserver_preload([target.recipe] if target.recipe else [namespace, _YAML_MODULE])
    # The server imports these while this process imports torch for the agent.
    forkserver.ensure_running()
    _run_agent(launch, debug, _rank, (target, options, folder, resume))


def run_script(target: Target, options: list[str], launch: list[str], debug: bool) -> int:
    """Run a user's own script with this Python and return its exit code; 128 + its number if a signal ended it.

    Args:
        target: the script.
        options: its command line.
        launch: torchrun's options; empty for one process.
        debug: let the agent log.

    Raises:
        InputError: if a launch option is wrong.
    """
    command = [sys.executable, str(target.file), *options]
    if not launch:
        return _run_child(command)
    _announce(launch)
    try:
        _run_agent(launch, debug, command[0], tuple(command[1:]))
    except _RankExit as ended:
        return ended.code
    return 0


class _RankExit(Exception):
    """A rank of a user's script ended with an exit code that is not 0."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a rank ended with exit code {code}")
        self.code = code


def _rank(target: Target, options: list[str], folder: RunFolder, resume: bool) -> None:
    """What every rank of a recipe or YAML does; a refusal is recorded by torch as what it is.

    Ranks that the agent has started again go on where the dead ones had come to.
    """
    resume = resume or int(os.environ.get(_seams.RESTARTS_VARIABLE, "0")) > 0
    try:
        call_target(target, options, folder, resume)
    except Exception as error:
        refusal = as_input_error(error)
        if refusal is None or refusal is error:
            raise
        raise InputError(str(refusal)) from error


def _announce(launch: list[str]) -> None:
    """Set what ranks inherit: that they were launched, and their share of the cores (torchrun: one thread, and a banner)."""
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault(_seams.SHARED_STORE_VARIABLE, "1")
    count = next((option.partition("=")[2] for option in launch if option.startswith("--nproc-per-node=")), "1")
    if count.isdigit():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))


def _run_agent(launch: list[str], debug: bool, entrypoint: Callable[..., None] | str, arguments: tuple[Any, ...]) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        config = _seams.agent_configuration(launch)
    except ValueError as error:
        raise InputError(f"the launch options {' '.join(launch)} are wrong: {error}") from error
    if not debug:
        for name in _seams.AGENT_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with TemporaryDirectory(prefix="lightning-run-") as logs:
        config.start_method = "forkserver"
        config.logs_specs = DefaultLogsSpecs(log_dir=logs)
        try:
            elastic_launch(config, entrypoint)(*arguments)
        except SignalException as received:
            raise SystemExit(128 + received.sigval) from received
        except ChildFailedError as failed:
            code = failed.get_first_failure()[1].exitcode
            if isinstance(entrypoint, str):
                raise _RankExit(code if code >= 0 else 128 - code) from None
            _raise_of_ranks(Path(logs), failed)
        except _seams.meeting_errors() as error:
            where = next((option.partition("=")[2] for option in launch if option.startswith(_MEETING_OPTIONS)), "localhost")
            raise InputError(
                f"the processes cannot meet at {where} ({one_line(str(error).partition('Exception raised')[0])}); "
                "give --rdzv-endpoint HOST:PORT of a running machine that all can reach, and --rdzv-backend c10d or static"
            ) from error


def _raise_of_ranks(logs: Path, failed: Exception) -> None:
    """Raise the sentence of a rank that refused something, else the traceback of the first that failed, in the last attempt."""
    errors = list(_seams.rank_errors(logs))
    refusal = f"{InputError.__name__}: "
    for message, traceback in errors:
        if message.startswith(refusal):
            raise InputError(message.removeprefix(refusal)) from RankError(traceback)
    raise RankError(errors[0][1] if errors else str(failed)) from None


def _run_child(command: list[str]) -> int:
    """Run a command on this terminal, hand it the signals that end a run, and return its exit code."""
    child = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    previous = {number: signal.signal(number, signal.SIG_IGN if _from_terminal(number) else forward) for number in numbers}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _from_terminal(number: int) -> bool:
    """Tell whether the terminal sends this signal to the child as well, so that forwarding it would send it twice."""
    if number != signal.SIGINT or not sys.stdin.isatty():
        return False
    return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
