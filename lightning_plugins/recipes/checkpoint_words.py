"""`lightning ckpt ls`, `verify` and `export`: what is kept of runs, whether it is whole, and one ordinary file of it."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.resilience.disk_folder import read_run
from lightning_plugins.engines.resilience.disk_steps import MANIFEST, DamagedFileError, StepOnDisk, steps, verify
from lightning_plugins.engines.resilience.keeper_listing import jobs_in_memory
from lightning_plugins.recipes.launch_options import Parser

_DEPTH = 5  # folders below the given one that are looked through
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def run_word(arguments: list[str]) -> int:
    """Do what follows `lightning ckpt`, and return the exit code: 1 if ``verify`` found damage."""
    word, *rest = arguments or ["--help"]
    if word in ("-h", "--help"):
        print(_usage())
        return 0
    if word not in _WORDS:
        raise InputError(f"there is no lightning ckpt {word!r}; {nearest(word, _WORDS)}")
    return _WORDS[word][0](rest)


def _ls(arguments: list[str]) -> int:
    parser = Parser(
        prog="lightning ckpt ls",
        description="Show what MemoryCheckpoint keeps: in this host's memory, and on disk in a folder and below it. It compares "
        "the sizes of files; `lightning ckpt verify` reads every byte.",
    )
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=Path(), help="where to look (default: here)")
    folder = _existing(parser.parse_args(arguments).folder)
    jobs = jobs_in_memory()
    print("In memory" if jobs else "In memory: nothing; no keeper of yours holds a job")
    for one in jobs:
        print(f"  job {one.job}  {_size(one.bytes)}  keeper {one.keeper_pid}")
        for held in one.steps:
            state = "committed" if held.is_committed else "not committed by all ranks"
            print(f"    step {held.step}  shards here: {held.shards}  {_age(time.time() - held.written_at)} old  {state}")
    found = list(_step_folders(folder))
    print("On disk" if found else f"On disk: no steps in {folder} or below it")
    for path in found:
        print(f"  {path}{_owner(path)}")
        for step in steps(path, thorough=False):
            print(f"    {_line(step)}")
    return 0


def _verify(arguments: list[str]) -> int:
    parser = Parser(
        prog="lightning ckpt verify",
        description="Read every byte of the steps and checkpoints in a folder and below it, or of one, and compare the "
        "checksums. The exit code is 1 if anything is damaged.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder, a step, or a .ckpt file")
    path = _existing(parser.parse_args(arguments).folder)
    whole = damaged = 0
    for found in _checkable(path):
        try:
            text = _check(found)
            whole += 1
        except DamagedFileError as error:
            text = str(error)
            damaged += 1
        print(f"{found}  {text}", flush=True)
    if not whole + damaged:
        raise InputError(f"{path} holds no steps of MemoryCheckpoint and no .ckpt files; give the folder that does")
    print(f"{whole} whole, {damaged} damaged")
    return int(damaged > 0)


def _export(arguments: list[str]) -> int:
    parser = Parser(
        prog="lightning ckpt export",
        description="Make one ordinary .ckpt of a step on disk, for Trainer.fit(ckpt_path=FILE) and torch.load.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a step, or the folder of several")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="the file to write")
    parser.add_argument("--step", metavar="N", type=int, help="which step (default: the newest that is whole)")
    given = parser.parse_args(arguments)
    path, output = _existing(given.folder), given.output
    if output.exists():
        raise InputError(f"{output} exists already and is not overwritten; choose another name, or remove it")
    chosen = _choose(path, given.step)
    from lightning_plugins.engines.resilience.disk_archive import save_checked
    from lightning_plugins.engines.resilience.disk_checkpoint import read_checkpoint

    try:
        checkpoint = read_checkpoint(chosen)
        with atomic_write(output) as file:
            save_checked(checkpoint, file)
    except DamagedFileError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}); choose a folder that exists and has room") from error
    print(output)
    return 0


def _choose(path: Path, number: int | None) -> Path:
    """Return the step to export, all of whose bytes are as they were."""
    if (path / MANIFEST).exists():
        return path
    found = steps(path)
    if not found:
        raise InputError(f"{path} holds no steps of MemoryCheckpoint; `lightning ckpt ls` finds those below a folder")
    numbers = ", ".join(str(one.step) for one in found)
    wanted = [one for one in found if number in (None, one.step)]
    if not wanted:
        raise InputError(f"{path} has no step {number}; it has {numbers}")
    for one in wanted:
        if not one.damage:
            return one.path
        print(f"left out: {one.damage}", flush=True)
    raise InputError(f"no step of {path} that was asked for is whole; it has {numbers}")


def _check(path: Path) -> str:
    if path.is_dir():
        verify(path)
        return "whole"
    from lightning_plugins.engines.resilience.disk_archive import check_archive

    return "whole" if check_archive(path) else "has no checksum; those that VerifiedCheckpointIO saves have one"


def _checkable(path: Path) -> Iterator[Path]:
    """Yield steps and .ckpt files."""
    if path.is_file() or path.name.startswith("step-"):
        yield path
        return
    for folder in _walk(path):
        yield from (step.path for step in steps(folder, thorough=False))
        yield from sorted(file for file in folder.glob("*.ckpt") if file.is_file())


def _step_folders(path: Path) -> Iterator[Path]:
    for folder in _walk(path):
        if steps(folder, thorough=False) or "job" in (read_run(folder) or {}):
            yield folder


def _walk(path: Path) -> Iterator[Path]:
    """Yield a folder and those below it that may hold steps."""
    for place, below, _ in os.walk(path):
        depth = len(Path(place).relative_to(path).parts)
        below[:] = sorted(name for name in below if depth < _DEPTH and not name.startswith((".", "step-")))
        yield Path(place)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"there is no {path}; give a folder that exists")
    return path


def _owner(path: Path) -> str:
    record = read_run(path) or {}
    return f"  job {record['job']}{', ended cleanly' if record.get('ended') else ''}" if "job" in record else ""


def _line(step: StepOnDisk) -> str:
    if step.damage:
        return f"step {step.step}  {step.damage}"
    return f"step {step.step}  {_size(step.bytes)}  {_age(time.time() - step.written_at)} old  complete"


def _size(size_bytes: int) -> str:
    unit, name = next((one for one in _UNITS if size_bytes >= one[0]), _UNITS[-1])
    return f"{size_bytes / unit:.3g} {name}"


def _age(seconds: float) -> str:
    unit, name = next((one for one in _AGES if seconds >= one[0]), _AGES[-1])
    return f"{max(0, int(seconds // unit))} {name}"


def _usage() -> str:
    return "\n".join(["usage: lightning ckpt COMMAND ...", "", *(f"  {word:<10}{text}" for word, (_, text) in _WORDS.items())])


_WORDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "ls": (_ls, "what is kept in memory and on disk"),
    "verify": (_verify, "read every byte and compare the checksums"),
    "export": (_export, "make one ordinary .ckpt of a step on disk"),
}
