"""The runner of mutations: a committed patch breaks a copy of the package, and the test that it names has to notice.

    python -m tests.mutations.run [area]

For each patch: copy the repository's code to a temporary folder, apply the patch there, run the named test against the copy,
and require it to go red: exit code 1 with a failed test, not a collection error and not a hang. Once for each named test it
has to be green on a copy without a patch. The tests run in ranks of the preloaded server, which import everything of ours from
the copy (the runner checks where each module came from), so a mutation costs about a second instead of ten.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.mutations.in_copy import CODE, Outcome, run_pytest
from tests.ranks.client import RankFailure, Ranks, RankTimeout
from tests.ranks.launch import rank_server

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
LIMIT_S = 120.0


class Mutation(NamedTuple):
    """A patch and its header.

    Attributes:
        name: area and file name, such as ``support/failpoints_never_stop``.
        patch: the file.
        kills: the test that has to go red.
        why: what the patch breaks.
        quick: whether the default suite runs it.
    """

    name: str
    patch: Path
    kills: str
    why: str
    quick: bool


class Verdict(NamedTuple):
    """What became of a mutation.

    Attributes:
        word: ``killed``; ``survived``: the named test stayed green; ``skipped``: this machine cannot run it; ``broken``: the
            patch, the test or its control is at fault, so that nothing was shown.
        detail: the reason of all but ``killed``.
    """

    word: str
    detail: str


def read(patch: Path, folder: Path = FOLDER) -> Mutation:
    """Read a patch's header.

    Raises:
        ValueError: if a line of the header is missing, or the patch changes anything but product code and test support.
    """
    text = patch.read_text(encoding="utf-8")
    header = dict(re.findall(r"^# (kills|why|quick): *(\S.*)$", text, re.MULTILINE))
    for word in ("kills", "why"):
        if word not in header:
            raise ValueError(f"{patch} has no line `# {word}: ...` in its header; see tests/mutations/README.md")
    changed = re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE)
    wrong = [path for path in changed if not path.startswith(("lightning_plugins/", "tests/ranks/")) or "/test_" in path]
    if wrong or not changed:
        raise ValueError(
            f"{patch} changes {wrong or 'no file'}; a mutation changes files of lightning_plugins/ or the support in tests/ranks/"
        )
    return Mutation(
        str(patch.relative_to(folder).with_suffix("")), patch, header["kills"], header["why"], header.get("quick") == "yes"
    )


def find(area: str = "", folder: Path = FOLDER) -> list[Mutation]:
    """Return the mutations of an area, or all.

    Raises:
        ValueError: if there are none, or a header is wrong.
    """
    found = [read(patch, folder) for patch in sorted((folder / area).rglob("*.patch"))]
    if not found:
        areas = ", ".join(sorted({patch.parent.name for patch in folder.rglob("*.patch")}))
        raise ValueError(f"there are no mutations in {area or folder}; areas are {areas}")
    return found


class Runner:
    """Judges mutations; the controls on unpatched code are run once a test.

    Args:
        ranks: the server to run tests in.
        root: the repository.
    """

    def __init__(self, ranks: Ranks, root: Path = ROOT) -> None:
        self._ranks = ranks
        self._root = root
        self._controls: dict[str, Outcome] = {}

    def judge(self, mutation: Mutation) -> Verdict:
        """Run a mutation's named test without and with its patch."""
        try:
            if mutation.kills not in self._controls:
                with self._copy() as copy:
                    self._controls[mutation.kills] = self._test(copy, mutation.kills)
            control = self._controls[mutation.kills]
            if control.exit_code == 0 and control.passed == 0 and control.skip_reasons:
                return Verdict("skipped", control.skip_reasons[0])
            if control.exit_code != 0 or control.passed == 0:
                return Verdict("broken", f"{mutation.kills} is not green without the patch\n{control.output}")
            with self._copy() as copy:
                apply(mutation.patch, copy)
                outcome = self._test(copy, mutation.kills)
        except (RankFailure, RankTimeout, ValueError) as error:
            return Verdict("broken", str(error))
        if outcome.exit_code == 0:
            return Verdict("survived", f"{mutation.kills} is green although: {mutation.why}")
        if outcome.exit_code != 1 or outcome.collection_errors or not outcome.failed:
            return Verdict("broken", f"{mutation.kills} did not fail, it could not run\n{outcome.output}")
        return Verdict("killed", "")

    @contextmanager
    def _copy(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
            copy = Path(folder).resolve()
            for entry in self._root.iterdir():
                if entry.name in CODE:
                    # Compiled files name the second in which their source was written: too coarse for a patch.
                    shutil.copytree(entry, copy / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
                elif not entry.name.startswith(".") and entry.suffix != ".egg-info":
                    (copy / entry.name).symlink_to(entry)
            yield copy

    def _test(self, copy: Path, test: str) -> Outcome:
        with self._ranks.at(copy).start(run_pytest, 1, str(copy), test, init=False, env={"PYTHONPATH": str(copy)}) as handle:
            handle.join(LIMIT_S)
            outcome: Outcome = handle.results()[0]._replace(output=handle.output(0))
        if outcome.foreign_modules:
            raise ValueError(f"{test} imported {', '.join(outcome.foreign_modules)} from elsewhere than the copy")
        return outcome


def apply(patch: Path, copy: Path) -> None:
    """Apply a patch to a copy, exactly.

    Raises:
        ValueError: if the patch does not fit any more, or changes nothing.
    """
    changed = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(encoding="utf-8"), re.MULTILINE)
    before = {path: (copy / path).read_bytes() for path in changed if (copy / path).exists()}
    # Inside of somebody's repository git would take the patch to be for that, skip it, and report success.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(copy.parent)
    done = subprocess.run(["git", "apply", str(patch)], cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{patch} no longer applies; make it anew\n{done.stderr}")
    for path in changed:
        if path not in before or (copy / path).read_bytes() == before[path]:
            raise ValueError(f"{patch} left {path} as it was, or made it; a mutation changes files that exist")


def main(area: str = "") -> int:
    """Judge the mutations of an area, or all, and print a table; return 1 unless all are killed or skipped."""
    mutations = find(area)
    width = max(len(mutation.name) for mutation in mutations)
    words = []
    with rank_server(ROOT) as ranks:
        runner = Runner(ranks)
        for mutation in mutations:
            started = time.monotonic()
            verdict = runner.judge(mutation)
            words.append(verdict.word)
            print(f"{mutation.name:{width}}  {verdict.word:8}  {time.monotonic() - started:5.1f} s  {mutation.kills}", flush=True)
            if verdict.detail:
                print(verdict.detail)
    print(", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)))
    return int(not set(words) <= {"killed", "skipped"})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
