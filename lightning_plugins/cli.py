"""`lightning`, or `lightning-plugins`: run, ls, info, cp, validate, ckpt, doctor.

Neither torch nor Lightning is imported before something is run, so that the other words answer at once and work in a broken
environment. Exit codes: 0; 2 for what the user can mend, with one sentence on the error stream; 1 for a defect, with its
traceback, from `doctor` if it found a trap, and from `ckpt verify` if it found damage; 130 and 143 after Ctrl-C and SIGTERM, with
the line that resumes; a user's own script keeps its own.
"""

import os
import signal
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning_plugins._support.atomic import remove_unfinished
from lightning_plugins._support.catalogue import copy_recipe, describe, list_all
from lightning_plugins._support.errors import InputError, RankError, as_input_error, causes, nearest, one_line
from lightning_plugins._support.run_folder import CONFIG_FILE, RunFolder
from lightning_plugins.recipes.launch_options import (
    Parser,
    launch_words,
    run_parser,
    several_machines,
    split_run,
    torchrun_options,
)

RUN_FINISHED = "run"
SDK = "lightning-sdk"


class Terminated(SystemExit):
    """SIGTERM, raised where the program stands so that everything on the way out is closed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    word, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if word in _COMMANDS:
            return _COMMANDS[word][0](rest)
        if word in ("-h", "--help"):
            print(_usage())
            return 0
        return _hand_over(word, rest)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _report(error, debug="--debug" in rest)


def _report(error: Exception, debug: bool) -> int:
    """Print what a user needs of an error and return the exit code."""
    refusal = as_input_error(error)
    if isinstance(error, RankError):
        print(str(error).rstrip(), file=sys.stderr)
    elif debug or refusal is None:
        traceback.print_exception(error)
    if refusal is None:
        return 1
    print(f"lightning: {refusal}", file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    own, word, options = split_run(arguments)
    given = run_parser().parse_args(own)
    from lightning_plugins.recipes.targets import choose_yaml_namespace, find_target

    if given.resume:
        folder, target, options = _open_run(given.resume, word, options)
        if folder.is_finished(RUN_FINISHED):
            print(f"this run is finished; there is nothing to resume\n{folder.path}")
            return 0
    elif word is None:
        raise InputError(
            "lightning run needs a target: a recipe's name, or the path of a .yaml or .py; `lightning ls` lists the recipes"
        )
    else:
        target = find_target(word)
    if given.nproc_per_node is None and target.nproc_per_node > 1:
        given.nproc_per_node = str(target.nproc_per_node)
    launch = torchrun_options(given)
    if target.is_script:
        from lightning_plugins.recipes.launching import run_script

        return run_script(target, options, launch, given.debug)
    if target.file:
        choose_yaml_namespace(target.file, options, Path(target.given).parent)
    if any(option in ("-h", "--help") or option.startswith("--print_config") for option in options):
        return _show_help(target, options)
    if not given.resume:
        shared = given.rdzv_id if several_machines(given) else None
        folder = RunFolder.create(given.runs_dir, target.name, options, target=target.given, shared_name=shared)
    return _run_in(folder, target, options, given, launch)


def _open_run(path: str, word: str | None, options: list[str]) -> tuple[RunFolder, Any, list[str]]:
    """Return folder, target and options of a run to go on with, and go to the directory that its options are relative to."""
    from lightning_plugins.recipes.targets import find_target, resumed_target

    folder = RunFolder.open(path)
    record = folder.read()
    recorded = record["target"]
    if options:
        raise InputError(f"--resume goes on with the recorded options, but got {' '.join(options)} as well; leave them out")
    if word is not None and find_target(word).given != recorded:
        raise InputError(f"{folder.path} is a run of {recorded}, not of {word}; leave the target out")
    if Path(record["directory"]).is_dir():
        os.chdir(record["directory"])
    else:
        warnings.warn(
            f"the run was started in {record['directory']}, which is gone; relative paths are looked up here", stacklevel=2
        )
    remove_unfinished(folder.path)
    target, holds_options = resumed_target(recorded, folder.path / CONFIG_FILE)
    return folder, target, [] if holds_options else record["options"]


def _show_help(target: Any, options: list[str]) -> int:
    """Let a target print its help or configuration, which leaves no run folder."""
    from tempfile import TemporaryDirectory

    from lightning_plugins.recipes.targets import call_target

    with TemporaryDirectory() as scratch:
        call_target(target, options, RunFolder(Path(scratch)), False)
    return 0


def _run_in(folder: RunFolder, target: Any, options: list[str], given: Namespace, launch: list[str]) -> int:
    """Run a recipe or YAML in its folder; print the folder last, or the line that resumes the run."""
    from lightning_plugins.recipes.launching import run_function

    signal.signal(signal.SIGTERM, _terminate)
    try:
        run_function(target, options, folder, bool(given.resume), launch, given.debug)
    except BaseException as error:
        code = _signal_code(error)
        if code is None:
            if not given.resume:
                folder.discard_unused()
            raise
        print(f"stopped; to go on: lightning run --resume {folder.path}{launch_words(given)}", file=sys.stderr)
        return code
    folder.finish(RUN_FINISHED)
    print(folder.path, flush=True)
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(128 + number)


def _signal_code(error: BaseException) -> int | None:
    """Return the exit code if a signal ended the run; Lightning turns Ctrl-C into SystemExit(1)."""
    if isinstance(error, SystemExit) and error.code in (130, 143):
        return int(error.code)
    if isinstance(error, KeyboardInterrupt | SystemExit) and any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):
        return 130
    return None


def _ls(arguments: list[str]) -> int:
    Parser(prog="lightning ls", description="List the recipes and the methods.").parse_args(arguments)
    print(list_all())
    return 0


def _info(arguments: list[str]) -> int:
    parser = Parser(prog="lightning info", description="Show a method's options and card, or a recipe's knobs.")
    parser.add_argument("name", metavar="NAME")
    print(describe(parser.parse_args(arguments).name))
    return 0


def _cp(arguments: list[str]) -> int:
    parser = Parser(prog="lightning cp", description="Copy a recipe's YAML, to change it and run the copy.")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("file", metavar="FILE", type=Path)
    given = parser.parse_args(arguments)
    copy_recipe(given.name, given.file)
    print(given.file)
    return 0


def _validate(arguments: list[str]) -> int:
    parser = Parser(prog="lightning validate", description="Build everything a YAML names, without running it.")
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
    given = parser.parse_args(arguments)
    from lightning_plugins.recipes.targets import validate_yaml

    validate_yaml(given.file)
    print("OK")
    return 0


def _ckpt(arguments: list[str]) -> int:
    from lightning_plugins.recipes.checkpoint_words import run_word

    return run_word(arguments)


def _doctor(arguments: list[str]) -> int:
    Parser(prog="lightning doctor", description="Look for the known traps of the installed packages.").parse_args(arguments)
    from lightning_plugins._support.doctor import examine

    findings = examine()
    for finding in findings:
        print(finding)
    return int(any(finding.is_trap for finding in findings))


def _hand_over(word: str, arguments: list[str]) -> int:
    """Hand a word of lightning-sdk's own to it; refuse every other.

    Raises:
        InputError: if the word is nobody's.
    """
    unknown = f"there is no command {word!r}"
    ours = nearest(word, _COMMANDS)
    try:
        scripts = metadata.distribution(SDK).entry_points.select(group="console_scripts", name=SDK)
    except metadata.PackageNotFoundError:
        raise InputError(f"{unknown} (if it is one of {SDK}: pip install {SDK}); {ours}") from None
    try:
        group = next(iter(scripts)).load()
        words = group.commands
    except Exception as error:
        raise InputError(f"{unknown}, and that of {SDK} cannot be loaded ({one_line(str(error))}); {ours}") from error
    if word not in words:
        raise InputError(f"{unknown}, here or in {SDK}; {nearest(word, [*_COMMANDS, *words])}")
    group(args=[word, *arguments], prog_name="lightning")
    return 0


def _usage() -> str:
    lines = [f"  {word:<10}{text}" for word, (_, text) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightning COMMAND ...",
            "",
            *lines,
            "",
            f"Other words are handed to {SDK}, where it is installed and knows them.",
        ]
    )


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "run": (_run, "run a recipe, a YAML, or a script of your own"),
    "ls": (_ls, "list the recipes and methods"),
    "info": (_info, "show a method's options and card, or a recipe's knobs"),
    "cp": (_cp, "copy a recipe's YAML"),
    "validate": (_validate, "build everything a YAML names, without running it"),
    "ckpt": (_ckpt, "list, verify and export what MemoryCheckpoint keeps"),
    "doctor": (_doctor, "look for known traps of the installed packages"),
}

if __name__ == "__main__":
    sys.exit(main())
