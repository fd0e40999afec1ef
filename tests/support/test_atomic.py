"""Whole or not at all: an interrupted write leaves what was there, and no temporary file."""

import os
import signal

import pytest

from lightning_plugins._support.atomic import atomic_path, atomic_write, remove_unfinished
from lightning_plugins._support.failpoints import armed


def test_the_file_appears_whole_with_ordinary_rights(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path, "w") as file:
        file.write("né\n")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == "né\n".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def write_half(path, error):
    with atomic_write(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_changes_nothing(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def write(path, content):
    with atomic_write(path) as file:
        file.write(content)


def test_the_old_file_is_replaced_and_not_written_over(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with path.open("rb") as reader:
        write(path, b"after")
        assert reader.read() == b"before"
    assert path.read_bytes() == b"after"


def test_a_disk_that_fills_at_the_last_moment_changes_nothing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with armed("atomic_write/replace=full"), pytest.raises(OSError, match="No space left"):
        write(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_before_the_rename_leaves_the_old_file_and_what_can_be_swept(tmp_path):
    path = tmp_path / "folder" / "a.bin"
    path.parent.mkdir()
    write(path, b"before")
    if (child := os.fork()) == 0:
        with armed("atomic_write/replace=kill"):
            write(path, b"after")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == b"before"
    assert len(list(path.parent.iterdir())) == 2, "the fail-point stands before the file was complete"
    others = [tmp_path / ".hidden", tmp_path / "mine.part"]
    for other in others:
        other.write_bytes(b"")
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.rglob("*")) == sorted([path.parent, path, *others])


def test_a_path_keeps_its_suffix_and_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")

    def write_by_name(error=None):
        with atomic_path(path) as temporary:
            assert (temporary.suffix, temporary.parent) == (".mp4", tmp_path)
            temporary.write_bytes(b"after")
            assert path.read_bytes() == b"before"
            if error:
                raise error

    with pytest.raises(ValueError, match="half"):
        write_by_name(ValueError("half"))
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"before", [path])
    write_by_name()
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"after", [path])
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_a_killed_writer_left_under_a_suffix_is_swept(tmp_path):
    (tmp_path / "mine.part.mp4").write_bytes(b"")
    if (child := os.fork()) == 0:
        with armed("atomic_write/replace=kill"), atomic_path(tmp_path / "a.mp4") as temporary:
            temporary.write_bytes(b"half")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.part.mp4"]
