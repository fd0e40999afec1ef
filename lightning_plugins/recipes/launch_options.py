"""The command line of `lightning run`: which words are ours, which are the target's, and which go to torchrun's agent."""

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn
from uuid import uuid4

from lightning_plugins._support.errors import InputError, nearest

# Options of `lightning run` that torchrun's agent takes as they are: metavar, help.
LAUNCH_OPTIONS = {
    "--nproc-per-node": ("N", "processes on this machine, or gpu: one for each GPU (default 1, or the recipe's)"),
    "--nnodes": ("N", "machines, or MIN:MAX for a run that shrinks and grows (default 1)"),
    "--max-restarts": ("N", "how often the ranks are started again after a failure (default 0)"),
    "--node-rank": ("N", "this machine's number, for the static rendezvous"),
    "--rdzv-endpoint": ("HOST:PORT", "where the machines meet"),
    "--rdzv-backend": ("NAME", "how they meet: c10d or static"),
    "--rdzv-id": (
        "ID",
        "the name of this run among those that meet there; also of its run folder when there are several machines",
    ),
    "--rdzv-conf": ("KEY=VALUE,...", "further settings of the rendezvous"),
    "--master-addr": ("HOST", "rank 0's machine, for the static rendezvous"),
    "--master-port": ("PORT", "its port, for the static rendezvous"),
    "--local-addr": ("HOST", "this machine's own address"),
    "--monitor-interval": ("SECONDS", "how often the agent looks at its ranks"),
}


class Parser(argparse.ArgumentParser):
    """A parser that refuses with an `InputError` and never guesses an abbreviated option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def split_run(arguments: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Split the words after `lightning run` into ours, the target, and the target's.

    Ours may stand before and after the target; after a script only the launch options are ours. What follows ``--`` is the
    target's.

    Raises:
        InputError: if an option that is not ours stands before the target.
    """
    own: list[str] = []
    options: list[str] = []
    target: str | None = None
    words = iter(arguments)
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        takes_value = name in LAUNCH_OPTIONS or name in ("--resume", "--runs-dir")
        is_own = takes_value or name == "--debug" or (target is None and name in ("-h", "--help"))
        if target is not None and target.endswith(".py"):
            is_own = name in LAUNCH_OPTIONS
        if word == "--":
            options.extend(words)
        elif is_own:
            own.append(name + word[len(name) :])
            if takes_value and "=" not in word:
                own.extend(value for value in [next(words, None)] if value is not None)
        elif target is None and "--resume" not in (option.partition("=")[0] for option in own):
            if word.startswith("-"):
                valid = [*LAUNCH_OPTIONS, "--resume", "--runs-dir", "--debug"]
                raise InputError(f"unknown option {word} before the target; {nearest(name, valid)}")
            target = word
        elif target is None and not options and not word.startswith("-"):
            target = word
        else:
            options.append(word)
    return own, target, options


def torchrun_options(given: argparse.Namespace) -> list[str]:
    """Return torchrun's options for what was given; none if it is one process that nobody restarts.

    Raises:
        InputError: if several machines are asked for, but not where they meet.
    """
    values = {flag: getattr(given, flag[2:].replace("-", "_")) for flag in LAUNCH_OPTIONS}
    launch = [f"{flag}={value}" for flag, value in values.items() if value is not None]
    if not set(launch) - {"--nproc-per-node=1", "--nnodes=1"}:
        return []
    meeting = values["--rdzv-endpoint"] or values["--master-addr"]
    if several_machines(given):
        if not meeting or not given.rdzv_id:
            raise InputError("several machines (--nnodes) need --rdzv-endpoint HOST:PORT and --rdzv-id ID, the same on each")
        if values["--rdzv-backend"] is None and values["--master-addr"] is None:
            launch.append("--rdzv-backend=c10d")
    elif not meeting:
        # What torchrun's --standalone stands for, which its configuration alone does not know: a rendezvous on a free port.
        launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={given.rdzv_id or uuid4()}"]
    return launch


def launch_words(given: argparse.Namespace) -> str:
    """Return the launch options as they were given, each after a space: what has to stand in the line that resumes the run."""
    values = {flag: getattr(given, flag[2:].replace("-", "_")) for flag in LAUNCH_OPTIONS}
    return "".join(f" {flag} {value}" for flag, value in values.items() if value is not None)


def several_machines(given: argparse.Namespace) -> bool:
    """Tell whether more than one machine may take part."""
    return given.nnodes not in (None, "1")


def run_parser() -> Parser:
    """Return the parser of our own options of `lightning run`."""
    parser = Parser(
        prog="lightning run",
        usage="lightning run TARGET [options] [options of the target]",
        description="Run a recipe by name, a YAML by path, or a script of your own by path (.py), on one or several processes.",
        epilog="After a script only the options of the launch are ours; after -- everything is the target's.",
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with the killed run in this folder, with its recorded options")
    parser.add_argument("--runs-dir", metavar="DIR", default="runs", help="the folder of all runs (default runs)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal, and the agent's log")
    launch = parser.add_argument_group("launch", "handed to torchrun's elastic agent")
    types = {"--nproc-per-node": _processes, "--nnodes": _machines, "--max-restarts": _count, "--node-rank": _count}
    types |= {"--master-port": _count, "--monitor-interval": _seconds}
    for flag, (metavar, text) in LAUNCH_OPTIONS.items():
        launch.add_argument(flag, metavar=metavar, help=text, type=types.get(flag, str))
    return parser


def _matching(pattern: str, valid: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"got {text}, must be {valid}")
        return text

    return check


_processes = _matching(r"[1-9]\d*|gpu|cpu|auto", "a number from 1, or gpu, cpu or auto")
_machines = _matching(r"[1-9]\d*(:[1-9]\d*)?", "a number from 1, or two as MIN:MAX")
_count = _matching(r"\d+", "a number from 0")
_seconds = _matching(r"\d+(\.\d+)?", "a number of seconds")
