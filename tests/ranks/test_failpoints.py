"""Fail-points: what each action does, at which hit, and what an unarmed one costs."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import VARIABLE, FailpointError, armed, failpoint


def test_unarmed_does_nothing():
    failpoint("anywhere")
    with armed("elsewhere=raise"):
        failpoint("anywhere")


def test_raise_names_the_place():
    with armed("save/commit=raise"), pytest.raises(FailpointError, match="save/commit"):
        failpoint("save/commit")
    failpoint("save/commit")


def test_acts_at_the_nth_hit_and_never_again():
    hits = []
    with armed("a=raise:3, b=raise"):
        for hit in range(1, 6):
            try:
                failpoint("a")
            except FailpointError:
                hits.append(hit)
        with pytest.raises(FailpointError):
            failpoint("b")
    assert hits == [3]


@pytest.fixture
def hasty_threads():
    """Threads that take turns as often as the interpreter allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    yield
    sys.setswitchinterval(before)


def test_hits_of_all_threads_count(hasty_threads):
    raised = []
    start = threading.Barrier(4)

    def hit_often():
        start.wait()
        for _ in range(10_000):
            try:
                failpoint("a")
            except FailpointError:
                raised.append(threading.get_ident())

    with armed("a=raise:40000"):
        threads = [threading.Thread(target=hit_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(raised) == 1


def test_blocks_nest_with_fresh_counts():
    with armed("a=raise:2"):
        failpoint("a")
        with armed("a=raise:2"):
            failpoint("a")
        with pytest.raises(FailpointError):
            failpoint("a")


def test_a_full_disk_looks_like_one():
    with armed("write=full"), pytest.raises(OSError, match="No space left on device") as caught:
        failpoint("write")
    assert caught.value.errno == errno.ENOSPC


def test_sleep_takes_its_seconds():
    with armed("slow=sleep:0.05:2"):
        failpoint("slow")
        started = time.monotonic()
        failpoint("slow")
    assert 0.05 <= time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    ("specification", "exit_code", "printed"),
    [
        ("work=kill:2", -signal.SIGKILL, "first\n"),
        ("work=exit:7:2", 7, "first\nfinally\n"),
        ("work=raise", 1, "finally\n"),
        ("", 0, "first\nsecond\nfinally\n"),
    ],
)
def test_the_variable_arms_other_processes(specification, exit_code, printed):
    """A kill runs no handler, an exit does."""
    program = (
        "from lightning_plugins._support.failpoints import failpoint\n"
        "try:\n    for word in ('first', 'second'):\n        failpoint('work'); print(word, flush=True)\n"
        "finally:\n    print('finally', flush=True)\n"
    )
    environment = {**os.environ, VARIABLE: specification}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (exit_code, printed)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("a=explode", "unknown action 'explode'; valid are exit, full, kill, raise, sleep"),
        ("a=rais", "did you mean raise"),
        ("a", "unknown action ''"),
        ("=raise", "is not understood; write name=raise or name=raise:COUNT"),
        ("a=raise:0", "COUNT 1 or more"),
        ("a=raise:x", "is not understood"),
        ("a=raise:1:2", "is not understood"),
        ("a=sleep", "write name=sleep:NUMBER or name=sleep:NUMBER:COUNT"),
        ("a=sleep:-1", "is not understood"),
        ("a=sleep:nan", "is not understood"),
    ],
)
def test_bad_specifications_are_refused(specification, message):
    with pytest.raises(InputError, match=message), armed(specification):
        pass


def test_unarmed_costs_less_than_a_microsecond():
    """Around 40 ns; the bound leaves room for a busy machine, and catches a lookup of the environment (2 us)."""
    best_s = min(_seconds_for(10_000) for _ in range(5))
    assert best_s / 10_000 < 1e-6


def _seconds_for(count):
    started = time.perf_counter()
    for _ in range(count):
        failpoint("anywhere")
    return time.perf_counter() - started
