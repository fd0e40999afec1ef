"""What runs inside a copy of the repository: one test under pytest, and the proof that it was the copy that was tested."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

CODE = ("lightning_plugins", "tests")  # our two packages, which a copy has of its own


class Outcome(NamedTuple):
    """What pytest said of one test: its exit code, counts, reasons of skips, and what it printed."""

    exit_code: int
    passed: int
    failed: int
    collection_errors: int
    skip_reasons: list[str]
    foreign_modules: list[str]
    output: str


class _Counter:
    """A pytest plugin that keeps what the exit code leaves out."""

    def __init__(self) -> None:
        self.passed = self.failed = self.collection_errors = 0
        self.skip_reasons: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.passed += report.passed
            self.failed += report.failed
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skip_reasons.append(report.longrepr[2])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.collection_errors += report.failed


def run_pytest(rank: int, world_size: int, root: str, test: str) -> Outcome:
    """Run one test in this process, from and against ``root``."""
    counter = _Counter()
    options = ["-x", "-m", "slow or not slow", "--rootdir", root, "--confcutdir", root]
    code = pytest.main([test, *options], plugins=[counter])
    foreign = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in CODE and file is not None and not Path(file).resolve().is_relative_to(root):
            foreign.append(name)
    return Outcome(int(code), counter.passed, counter.failed, counter.collection_errors, counter.skip_reasons, foreign, "")
