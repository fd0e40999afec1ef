"""`lightning`, or `lightning-plugins`: run, ls, info, cp, validate, doctor.

Neither torch nor Lightning is imported before something is run, so that the other words answer at once and work in a broken
environment. Exit codes: 0; 2 for what the user can mend, with one sentence on the error stream; 1 for a defect, with its
traceback; 130 and 143 after Ctrl-C and SIGTERM, with the line that resumes; a user's own script keeps its own.
"""

import argparse
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning_plugins._support.catalogue import describe, list_all
from lightning_plugins._support.errors import InputError, as_input_error, causes, nearest
from lightning_plugins._support.methods import RECIPES
from lightning_plugins._support.run_folder import RunFolder

# Options of `lightning run` that torchrun's agent takes as they are: type, metavar, help.
LAUNCH_OPTIONS: dict[str, tuple[str, str]] = {
    "--nproc-per-node": ("N", "processes on this machine, or gpu: one for each GPU (default 1)"),
    "--nnodes": ("N", "machines, or MIN:MAX for a run that shrinks and grows (default 1)"),
    "--max-restarts": ("N", "how often the ranks are started again after a failure (default 0)"),
    "--node-rank": ("N", "this machine's number, for the static rendezvous"),
    "--rdzv-endpoint": ("HOST:PORT", "where the machines meet"),
    "--rdzv-backend": ("NAME", "how they meet: c10d or static"),
    "--rdzv-id": ("ID", "the name of this run among those that meet there; also of its run folder when there are several machines"),
    "--rdzv-conf": ("KEY=VALUE,...", "further settings of the rendezvous"),
    "--master-addr": ("HOST", "rank 0's machine, for the static rendezvous"),
    "--master-port": ("PORT", "its port, for the static rendezvous"),
    "--local-addr": ("HOST", "this machine's own address"),
    "--monitor-interval": ("SECONDS", "how often the agent looks at its ranks"),
}
RUN_FINISHED = "run"
SDK = "lightning-sdk"


class Terminated(SystemExit):
    """SIGTERM, raised where the program stands so that everything on the way out is closed."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    word, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = _COMMANDS.get(word, (None, ""))[0]
    debug = [False]
    try:
        if command:
            return command(rest, debug)
        if word in ("-h", "--help"):
            print(_usage())
            return 0
        return _hand_over(word, rest)
    except Exception as error:
        return _report(error, debug[0])
    except KeyboardInterrupt:
        return 130


def _report(error: Exception, debug: bool) -> int:
    """Print what a user needs of an error and return the exit code."""
    from lightning_plugins._support.errors import RankError

    refusal = as_input_error(error)
    if isinstance(error, RankError):
        print(error, file=sys.stderr)
    elif debug or refusal is None:
        traceback.print_exception(error)
    if refusal is None:
        return 1
    print(f"lightning: {refusal}", file=sys.stderr)
    return 2


def _run(arguments: list[str], debug: list[bool]) -> int:
    own, word, options = split_run(arguments)
    parser = _run_parser()
    given = parser.parse_args(own)
    debug[0] = given.debug
    from lightning_plugins.recipes.launching import run_function, run_script
    from lightning_plugins.recipes.targets import choose_yaml_namespace, find_target

    launch = _torchrun_options(given)
    if given.resume:
        folder = RunFolder.open(given.resume)
        record = folder.read()
        if options:
            raise InputError(f"--resume goes on with the recorded options, but got {' '.join(options)} as well; leave them out")
        target, options = find_target(record["target"]), record["options"]
        if word is not None and find_target(word) != target:
            raise InputError(f"{folder.path} is a run of {record['target']}, not of {word}; leave the target out")
        if folder.is_finished(RUN_FINISHED):
            print(f"the run is finished; there is nothing to resume\n{folder.path}")
            return 0
    elif word is None:
        raise InputError("lightning run needs a target: a recipe's name, or the path of a .yaml or .py; `lightning ls` lists the recipes")
    else:
        target = find_target(word)
    if target.is_script:
        return run_script(target, options, launch, given.debug)
    if target.file:
        choose_yaml_namespace(target.file, options)
    if not given.resume:
        folder = RunFolder.create(given.runs_dir, target.name, options, target=target.given)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run_function(target, options, folder, bool(given.resume), launch, given.debug)
    except BaseException as error:
        code = _signal_code(error)
        if code is None:
            folder.discard_unused()
            raise
        print(f"stopped; to go on: lightning run --resume {folder.path}", file=sys.stderr)
        return code
    folder.finish(RUN_FINISHED)
    print(folder.path)
    return 0


def split_run(arguments: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Split the words after `lightning run` into ours, the target, and the target's.

    Ours may stand before and after the target; after a script only the launch options are ours. What follows ``--`` is the target's.

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
                raise InputError(f"unknown option {word} before the target; {nearest(name, [*LAUNCH_OPTIONS, '--resume', '--runs-dir', '--debug'])}")
            target = word
        elif target is None and not word.startswith("-"):
            target = word
        else:
            options.append(word)
    return own, target, options
