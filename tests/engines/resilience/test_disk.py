"""Steps on disk: what is read is what was written, torch's own tools read it too, and no damage passes."""

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import armed
from lightning_plugins.engines.resilience import disk_folder
from lightning_plugins.engines.resilience.disk import DamagedFileError, read_step, steps, verify, write_step
from lightning_plugins.engines.resilience.disk_folder import claim, mark_ended, read_run
from lightning_plugins.engines.resilience.disk_steps import MANIFEST, encode_manifest
from tests.engines.resilience.keeper_parts import assert_is_state_of, assert_same, state_of, wide_state

NUMBERS = 450_000  # 5.4 MB a state: two chunks


def numbers_of(folder, thorough=True):
    return [one.step for one in steps(folder, thorough=thorough) if not one.damage]


def training_state():
    """What Lightning puts into a checkpoint, with a tied weight."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[1].weight = net[0].weight
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    return {
        "state_dict": dict(net.state_dict(prefix="net.")),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "epoch": 3,
        "hyper_parameters": {"lr": 0.01, "name": "né", 1: "int", "1": "str"},
    }


def test_a_state_comes_back_bit_by_bit(tmp_path):
    shared, own = training_state(), wide_state()
    path = write_step(tmp_path, 100, {"shared": shared, "rank0": own}, {"world_size": 1})
    assert path == tmp_path / "step-000000100"
    assert_same(read_step(path, "rank0"), own)
    found = read_step(str(path), "shared")
    assert_same(found, shared)
    assert found["state_dict"]["net.0.weight"].data_ptr() == found["state_dict"]["net.1.weight"].data_ptr()
    (step,) = steps(tmp_path)
    assert (step.path, step.step, step.damage, step.meta) == (path, 100, "", {"world_size": 1})
    assert step.bytes == sum(file.stat().st_size for file in path.iterdir() if file.name != MANIFEST)
    assert abs(step.written_at - path.stat().st_mtime) < 10
    assert os.listdir(tmp_path) == ["step-000000100"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    with pytest.raises(InputError, match="has no shard 'rank7'; it has rank0, shared"):
        read_step(path, "rank7")


def test_torch_reads_the_tensors_by_their_paths(tmp_path):
    shared, own = training_state(), wide_state()
    path = write_step(tmp_path, 100, {"shared": shared, "rank0": own})
    wanted = {
        "state_dict": {name: torch.zeros_like(value) for name, value in shared["state_dict"].items()},
        "rank0": {"strided": torch.zeros(2, 2, dtype=torch.float64), "scalar": torch.zeros(()), "empty": torch.zeros(0, 4)},
        "epoch": -1,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, checkpoint_id=str(path))
    assert_same(wanted["state_dict"], shared["state_dict"])
    assert_same(wanted["rank0"], {name: own[name] for name in wanted["rank0"]})
    assert wanted["epoch"] == 3


def test_torch_makes_one_file_of_it(tmp_path):
    shared = training_state()
    path = write_step(tmp_path, 100, {"shared": shared})
    dcp_to_torch_save(str(path), str(tmp_path / "one.pt"))
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert_same(found["state_dict"], shared["state_dict"])
    assert_same(found["optimizer_states"][0]["param_groups"], shared["optimizer_states"][0]["param_groups"])
    assert_same(found["optimizer_states"][0]["state"]["0"], shared["optimizer_states"][0]["state"][0])
    assert (found["epoch"], found["lr_schedulers"], found["hyper_parameters"]["name"]) == (3, [], "né")


def test_reading_takes_no_pickle_but_the_safe_one(tmp_path, monkeypatch):
    path = write_step(tmp_path, 100, {"shared": wide_state()})
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(torch.serialization, "_legacy_load", None)
    loaded = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loaded.append(k["weights_only"]) or real(*a, **k))
    read_step(path, "shared")
    assert set(loaded) == {True}


def test_the_newest_whole_steps_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        write_step(tmp_path, step, {"shared": state_of(step, 10)}, keep=2)
    assert numbers_of(tmp_path) == [40, 30]
    write_step(tmp_path, 50, {"shared": state_of(50, 10)}, keep=3)
    assert numbers_of(tmp_path) == [50, 40, 30]
    (tmp_path / "step-000000040" / "shared.distcp").unlink()
    write_step(tmp_path, 60, {"shared": state_of(60, 10)}, keep=3)
    assert numbers_of(tmp_path) == [60, 50, 30]  # the damaged one does not count
    write_step(tmp_path, 35, {"shared": state_of(35, 10)}, keep=3)
    assert numbers_of(tmp_path) == [35, 30]  # the run went back: later ones are of a past that was given up
    write_step(tmp_path, 35, {"shared": state_of(36, 10)}, keep=1)
    assert numbers_of(tmp_path) == [35]
    assert read_step(tmp_path / "step-000000035", "shared")["step"] == 36
    assert os.listdir(tmp_path) == ["step-000000035"]


def test_a_disk_that_gives_back_something_else_costs_no_older_step(tmp_path, monkeypatch):
    for step in (10, 20):
        write_step(tmp_path, step, {"shared": state_of(step, 1000)})
    moved = disk_folder.move_into_place

    def on_a_bad_disk(temporary, path):
        moved(temporary, path)
        damage_bit(path / "shared.distcp", random.Random(1))

    monkeypatch.setattr(disk_folder, "move_into_place", on_a_bad_disk)
    with pytest.raises(DamagedFileError, match=r"step-000000030/shared.distcp is damaged: it differs in its chunk 0 of 1"):
        write_step(tmp_path, 30, {"shared": state_of(30, 1000)}, keep=1)
    assert numbers_of(tmp_path) == [20, 10]


# Damage


def damage_bit(path, draws):
    data = bytearray(path.read_bytes())
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    path.write_bytes(data)


def damage_byte(path, draws):
    data = bytearray(path.read_bytes())
    place = draws.randrange(len(data))
    data[place] = (data[place] + draws.randrange(1, 256)) % 256
    path.write_bytes(data)


def swap_blocks(path, draws):
    data = bytearray(path.read_bytes())
    size = min(512, len(data) // 3)
    for _ in range(1000):
        one, other = sorted(draws.randrange(len(data) // size) * size for _ in range(2))
        first, second = data[one : one + size], data[other : other + size]
        if first != second and len(first) == len(second):
            break
    data[one : one + size], data[other : other + size] = second, first
    path.write_bytes(data)


def truncate(path, draws):
    os.truncate(path, draws.randrange(path.stat().st_size))


def lengthen(path, draws):
    path.write_bytes(path.read_bytes() + bytes(draws.randrange(1, 5000)))


def zero_page(path, draws):
    data = bytearray(path.read_bytes())
    size = min(4096, len(data))
    while True:
        start = draws.randrange(-(-len(data) // size)) * size
        if any(data[start : start + size]):
            break
    data[start : start + size] = bytes(len(data[start : start + size]))
    path.write_bytes(data)


def remove(path, draws):
    path.unlink()


def take_stale(path, draws):
    """Put the step before under this step's name: data, manifest, or all of it."""
    shutil.copy(path.parents[1] / "step-000000010" / path.name, path)


DAMAGES = [damage_bit, damage_byte, swap_blocks, truncate, lengthen, zero_page, remove, take_stale]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for step in (10, 20):
        write_step(folder, step, {"shared": state_of(step, NUMBERS), "rank0": state_of(step, 50)})
    return folder


@pytest.mark.parametrize("name", ["shared.distcp", "rank0.distcp", "manifest.json", ".metadata"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_is_found_and_the_older_step_is_whole(two_steps, tmp_path, damage, name):
    draws = random.Random(f"{damage.__name__} {name}")
    for trial in range(4):
        folder = tmp_path / str(trial)
        shutil.copytree(two_steps, folder)
        path = folder / "step-000000020"
        before = (path / name).read_bytes()
        damage(path / name, draws)
        if name == ".metadata" and damage is take_stale and (path / name).read_bytes() == before:
            return  # both steps have the same places
        with pytest.raises(DamagedFileError, match="step-000000020") as raised:
            verify(path)
        assert "\n" not in str(raised.value)
        assert raised.value.step in (20, -1)
        newest, older = steps(folder)
        assert (newest.step, older.step, older.damage) == (20, 10, "")
        assert str(path / name) in newest.damage
        assert numbers_of(folder) == [10]
        if name != ".metadata":  # which our own reading does not use
            with pytest.raises(DamagedFileError):
                [read_step(path, shard) for shard in ("shared", "rank0")]
        assert_is_state_of(read_step(folder / "step-000000010", "shared"), 10, NUMBERS)


def test_every_byte_of_a_manifest_is_covered(tmp_path):
    path = write_step(tmp_path, 20, {"shared": {"step": 20}}, {"world_size": 1})
    whole = (path / MANIFEST).read_bytes()
    assert b'"world_size":1' in whole
    for damaged in (
        whole.replace(b'"world_size":1', b'"world_size":2'),
        whole.replace(b",", b", "),
        *(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in range(len(whole))),
    ):
        (path / MANIFEST).write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"manifest\.json is damaged: it is not what was written"):
            verify(path)
    (path / MANIFEST).write_bytes(whole)
    verify(path)


def test_a_step_under_another_name_is_found(two_steps, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(two_steps / "step-000000010", folder / "step-000000030")
    assert "is the one of step 10" in steps(folder)[0].damage
    with pytest.raises(DamagedFileError):
        read_step(folder / "step-000000030", "shared")


def test_a_step_of_another_format_is_said_to_be_so(tmp_path):
    path = write_step(tmp_path, 1, {"shared": {}})
    manifest = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_bytes(encode_manifest({**manifest, "format": 2}))
    with pytest.raises(DamagedFileError, match="has format 2, not 1"):
        verify(path)


def test_folders_that_are_no_steps_do_not_count(tmp_path):
    assert steps(tmp_path / "nothing") == []
    write_step(tmp_path, 1, {"shared": {"step": 1}})
    for name in ("step-12", "step-00000000x", ".step-000000002.9.part", "lightning_logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000003").mkdir()
    assert [(one.step, bool(one.damage)) for one in steps(tmp_path)] == [(3, True), (1, False)]


# Refusals


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_sentence_and_costs_nothing(small_disk):
    write_step(small_disk, 1, {"shared": state_of(1, NUMBERS)})
    for _ in range(2):
        with pytest.raises(
            InputError, match=rf"nothing can be kept in {small_disk}: No space left on device; free space"
        ) as raised:
            write_step(small_disk, 2, {"shared": state_of(2, 2 * NUMBERS)})
        assert "\n" not in str(raised.value)
        assert os.listdir(small_disk) == ["step-000000001"]
        assert_is_state_of(read_step(small_disk / "step-000000001", "shared"), 1, NUMBERS)
    write_step(small_disk, 3, {"shared": state_of(3, 1000)})
    assert numbers_of(small_disk) == [3, 1]


@pytest.mark.parametrize("place", ["write", "file_sync", "folder_sync", "rename"])
def test_a_disk_that_fills_at_any_place(tmp_path, place):
    write_step(tmp_path, 1, {"shared": state_of(1, 10)})
    with armed(f"resilience/disk/{place}=full"), pytest.raises(InputError, match="No space left") as raised:
        write_step(tmp_path, 2, {"shared": state_of(2, 10)})
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["step-000000001"]


def test_a_replacement_that_fails_leaves_what_it_was_to_replace(tmp_path):
    write_step(tmp_path, 1, {"shared": state_of(1, 10)})
    with armed("resilience/disk/rename=full"), pytest.raises(InputError, match="No space left"):
        write_step(tmp_path, 1, {"shared": state_of(2, 10)})
    assert os.listdir(tmp_path) == ["step-000000001"]
    assert_is_state_of(read_step(tmp_path / "step-000000001", "shared"), 1, 10)


def test_a_claim_does_not_wait_for_a_writer(tmp_path):
    claim(tmp_path, "mine")
    with disk_folder.locked(tmp_path):
        claim(tmp_path, "mine")


def test_a_read_only_folder(small_disk, tmp_path):
    claim(small_disk, "mine")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match=rf"nothing can be kept in {small_disk}: Read-only file system"):
        write_step(small_disk, 1, {"shared": {}})
    with pytest.raises(InputError, match=r"nothing can be kept in .*: Read-only file system; free space or permit it"):
        claim(small_disk / "below", "mine")
    claim(small_disk, "mine")


def test_a_folder_of_another_job_or_of_nobody(tmp_path):
    claim(tmp_path / "a" / "b", "mine")
    claim(tmp_path / "a" / "b", "mine")
    assert read_run(tmp_path / "a" / "b")["job"] == "mine"
    with pytest.raises(InputError, match=r"b belongs to job 'mine', not to job 'yours'; give another disk_dir"):
        claim(tmp_path / "a" / "b", "yours")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "run.json").write_text('{"recipe": "panoramic_depth"}')
    with pytest.raises(InputError, match="belongs to a run that is not MemoryCheckpoint's, not to job 'mine'"):
        claim(tmp_path / "recipe", "mine")
    write_step(tmp_path, 1, {"shared": {}})
    with pytest.raises(InputError, match=r"holds steps but no run\.json"):
        claim(tmp_path, "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="nothing can be kept in"):
        claim(tmp_path / "file", "mine")


def test_a_clean_end_is_marked(tmp_path):
    claim(tmp_path, "mine")
    assert read_run(tmp_path)["ended"] is False
    mark_ended(tmp_path)
    claim(tmp_path, "mine")
    assert read_run(tmp_path)["ended"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"step": -1}, "step must be 0 or more"),
        ({"keep": 0}, "keep must be 1 or more"),
        ({"shards": {"../up": {}}}, "letters, digits"),
        ({"shards": {}}, "got none at all"),
        ({"meta": {"a": {1, 2}}}, "meta takes numbers"),
        ({"shards": {"shared": {"a": {"b": lambda: 0}}}}, "a / b: a value of type builtins.function cannot be saved"),
    ],
)
def test_bad_values_leave_nothing(tmp_path, arguments, words):
    given = {"step": 1, "shards": {"shared": {"a": torch.ones(1)}}, "meta": {}, "keep": 2} | arguments
    with pytest.raises(InputError, match=words):
        write_step(tmp_path, **given)
    assert list(Path(tmp_path).iterdir()) == []
