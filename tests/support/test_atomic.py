"""Whole or not at all: an interrupted write leaves what was there, and no temporary file."""

import os

import pytest

from lightning_plugins._support.atomic import atomic_write


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
