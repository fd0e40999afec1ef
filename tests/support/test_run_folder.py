"""The folder of a run: made once, found again, refused in one sentence."""

import json
from datetime import datetime

import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.run_folder import RunFolder

NOON = datetime(2026, 3, 4, 12, 0, 5)


def test_the_name_is_the_time_and_never_taken_twice(tmp_path):
    names = [RunFolder.create(tmp_path, "tiny", [], now=NOON).path for _ in range(3)]
    assert [path.name for path in names] == ["2026-03-04_12-00-05", "2026-03-04_12-00-05-2", "2026-03-04_12-00-05-3"]
    assert all(path.parent == tmp_path / "tiny" for path in names)


def test_the_record_survives_a_round_trip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create(tmp_path, "tiny", ["--x", "1"], target="/some/tiny.yaml")
    again = RunFolder.open(run.path)
    record = {"recipe": "tiny", "target": "/some/tiny.yaml", "options": ["--x", "1"], "directory": str(tmp_path), "finished": []}
    assert again.read() == record
    assert not again.is_finished("teacher")
    again.finish("teacher")
    again.finish("teacher")
    assert RunFolder.open(run.path).read()["finished"] == ["teacher"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"recipe": "tiny"}'])
def test_what_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="give the run folder that the killed run printed"):
        RunFolder.open(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\); choose another place with --runs-dir"):
        RunFolder.create(tmp_path / "file", "tiny", [])


def test_launchers_of_several_machines_share_one_folder(tmp_path, monkeypatch):
    first = RunFolder.create(tmp_path, "tiny", ["--x"], shared_name="job7")
    monkeypatch.chdir(tmp_path)  # the same working directory may have another name on another machine
    second = RunFolder.create(tmp_path, "tiny", ["--x"], shared_name="job7")
    assert first.path == second.path == tmp_path / "tiny" / "job7"
    with pytest.raises(InputError, match="the folder of another run; give this one a --rdzv-id of its own"):
        RunFolder.create(tmp_path, "tiny", ["--y"], shared_name="job7")


def test_only_an_unused_folder_is_discarded(tmp_path):
    unused, used = (RunFolder.create(tmp_path, name, []) for name in ("unused", "used"))
    (used.path / "metrics.csv").write_text("step\n")
    unused.discard_unused()
    used.discard_unused()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert json.loads((used.path / "run.json").read_text())["recipe"] == "used"
