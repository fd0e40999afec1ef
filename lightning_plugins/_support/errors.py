"""What a user gave or has, and can mend: the command line prints it as one sentence and exits with 2.

Everything else that is raised is a defect, and is shown with its traceback.
"""

import errno
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

# Out of space, over quota, no permission, read-only: the machine's state, not a defect of the program.
_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
# torch's zip writer reports a failed write as a bare RuntimeError with one of these.
_TORCH_WRITE_FAILURES = ("PytorchStreamWriter failed", "unexpected pos")


class InputError(ValueError):
    """What was given, what is valid, what to do next, in one sentence."""


class PackageError(ImportError):
    """A package is missing or must not be used; the message ends with the command that mends it."""


class RankError(Exception):
    """A rank of several died of a defect; the message is its traceback."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a clause that names the valid words nearest to ``name``, or all of them if none is near."""
    valid = sorted(valid)
    close = get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid are {', '.join(valid)}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error``, then what it was raised from or during, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def as_input_error(error: BaseException) -> InputError | None:
    """Return the sentence for an error that the user can mend, or None if it is a defect.

    Args:
        error: any exception; the chain of its causes is searched, outermost first.
    """
    for cause in causes(error):
        if isinstance(cause, InputError):
            return cause
        if isinstance(cause, PackageError):
            return InputError(one_line(str(cause)))
        if isinstance(cause, OSError) and cause.errno in _STORAGE_ERRNOS:
            place = cause.filename or "a file of the run"
            return InputError(
                f"{place}: {cause.strerror}; free space or permit it there, or choose another place with --runs-dir DIR"
            )
        if isinstance(cause, RuntimeError) and any(words in str(cause) for words in _TORCH_WRITE_FAILURES):
            return InputError("a checkpoint could not be written; free space, or choose another place with --runs-dir DIR")
    return None


def one_line(text: str) -> str:
    """Return ``text`` with every run of white space, line ends included, as one space."""
    return " ".join(text.split())
