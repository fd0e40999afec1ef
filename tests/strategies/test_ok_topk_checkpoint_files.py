"""The files beside a checkpoint: complete whenever a run is killed, gone with their checkpoint, refused where they are bad."""

import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from lightning_plugins import OkTopkStrategy
from lightning_plugins._lightning import LIGHTNING_VERSION, ModelCheckpoint, submodule
from lightning_plugins._support.failpoints import armed
from lightning_plugins.strategies import _rank_files
from lightning_plugins.strategies.atomic_checkpoint import AtomicCheckpointIO
from tests.strategies.ok_topk_parts import BUCKETS, OPTIONS, STEPS, Net, assert_same, fit, refusal

pytestmark = pytest.mark.adapter


def strategy(**options):
    return OkTopkStrategy(**{**OPTIONS, **BUCKETS, **options})


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file() or path.is_symlink())


def rank_files(checkpoint):
    """Return the files that a checkpoint names."""
    said = torch.load(checkpoint, weights_only=True)["ok_topk"]
    return [Path(f"{checkpoint}.ok_topk", said["token"], f"rank{rank:04d}.pt") for rank in range(said["ranks"])]


def save_one(rank, world_size, path):
    return fit(Net(save={4: path}), world_size, strategy())


def resume(rank, world_size, path, module=Net, **options):
    """Resume; return the outcome or what was raised, and all warnings of residuals."""
    found = {}

    def resumed():
        found.update(fit(module(), world_size, strategy(**options), path))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = refusal(resumed)
    return found or said, [str(warning.message) for warning in caught if "residuals" in str(warning.message)]


class Slow(AtomicCheckpointIO):
    """Writes after a moment."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        time.sleep(0.3)
        super().save_checkpoint(checkpoint, path, storage_options)


def save_later(rank, world_size, path):
    plugin = submodule("plugins.io").AsyncCheckpointIO(Slow())
    return fit(Net(save={4: path}), world_size, OkTopkStrategy(**OPTIONS, **BUCKETS, checkpoint_io=plugin))


@pytest.mark.skipif(LIGHTNING_VERSION.startswith("2.5."), reason="its AsyncCheckpointIO writes what training has changed since")
def test_a_plugin_that_writes_in_the_background_writes_all(ranks, tmp_path):
    path = str(tmp_path / "a.ckpt")
    whole = ranks.run(save_later, 2, path)
    for (outcome, said), expected in zip(ranks.run(resume, 2, path), whole, strict=True):
        assert said == []
        assert_same(outcome, expected)


def resume_blind(rank, world_size, path):
    """Rank 1 does not see the files of the ranks."""
    if rank == 1:
        _rank_files.find = lambda *rest: None
    return resume(rank, world_size, path, dense_steps=10)


def test_files_that_some_ranks_do_not_see_are_named_on_all(ranks, tmp_path):
    path = str(tmp_path / "a.ckpt")
    ranks.run(save_one, 2, path)
    for said, _ in ranks.run(resume_blind, 2, path):
        assert "InputError: ranks [1] do not see the residuals in" in said
        assert "a.ckpt.ok_topk, others do; put checkpoint and folder where all ranks can read" in said


class Longer(Net):
    """Has a parameter that the checkpoint does not know, which Lightning lets pass."""

    strict_loading = False

    def __init__(self):
        super().__init__()
        self.added = torch.nn.Parameter(torch.zeros(3))


def resume_damaged(rank, world_size, path):
    """Resume from one checkpoint in ever worse states; rank 0 does the damage."""
    found = {"whole": resume(rank, world_size, path), "another model": resume(rank, world_size, path, Longer)}
    files = rank_files(path)
    for name, damage in (
        ("cut", lambda: os.truncate(files[1], 1000)),
        ("text", lambda: files[1].write_text("not a file of torch")),
        ("code", lambda: torch.save({"residual": print}, files[1])),
        ("something else", lambda: torch.save({"residual": {}}, files[1])),
        ("one missing", files[1].unlink),
        ("none", lambda: shutil.rmtree(f"{path}.ok_topk")),
    ):
        torch.distributed.barrier()
        if rank == 0:
            damage()
        torch.distributed.barrier()
        found[name] = resume(rank, world_size, path)
    return found


def test_files_that_are_bad_are_refused_and_missing_ones_are_missed(ranks, tmp_path):
    path = str(tmp_path / "a.ckpt")
    whole = ranks.run(save_one, 2, path)
    results = ranks.run(resume_damaged, 2, path)
    for found, expected in zip(results, whole, strict=True):
        assert_same(found["whole"][0], expected)
        assert found["whole"][1] == []
        for name in ("one missing", "none"):
            outcome, (said,) = found[name]
            assert f"saved with residuals in {path}.ok_topk, and they are not there" in said
            assert outcome["steps"] == STEPS - 4
            assert not torch.equal(outcome["weights"], expected["weights"])
    for found in results:  # the file of rank 1 alone was bad
        for name in ("cut", "text", "code"):
            assert "rank0001.pt cannot be read as residuals; resume from another checkpoint" in found[name][0]
        assert "this is no state of Ok-Topk" in found["something else"][0]
        said = found["another model"][0]
        assert "InputError: the state is of another model: parameter added is missing in it and 3 here" in said


def keep(rank, world_size, folder):
    """Train with callbacks that save, and resume from what they have left."""
    for callback in (
        ModelCheckpoint(f"{folder}/best", every_n_train_steps=2, filename="{step}"),
        ModelCheckpoint(f"{folder}/link", every_n_train_steps=2, filename="{step}", save_last="link"),
        ModelCheckpoint(f"{folder}/weights", every_n_train_steps=2, save_weights_only=True),
    ):
        fit(Net(), world_size, strategy(), enable_checkpointing=True, callbacks=[callback])
    link = f"{folder}/link/last.ckpt"
    plain = resume(rank, world_size, f"{folder}/link/step=6.ckpt")
    linked = resume(rank, world_size, link)
    return os.path.islink(link), plain, linked


def test_files_go_with_their_checkpoint_and_are_found_through_a_link(ranks, tmp_path):
    for is_link, plain, linked in ranks.run(keep, 2, str(tmp_path)):
        assert is_link
        assert linked[1] == []
        assert_same(linked[0], plain[0])
        assert linked[0]["residual"].any()
    checkpoint, *files = names(tmp_path / "best")
    assert checkpoint == "step=6.ckpt"
    assert [Path(file).name for file in files] == ["rank0000.pt", "rank0001.pt"]
    assert all(file.startswith("step=6.ckpt.ok_topk/") for file in files)
    assert not list(Path(tmp_path, "best").glob("step=[24]*")), "a folder outlives its checkpoint"
    assert not any("ok_topk" in file for file in names(tmp_path / "weights"))


def save_often(rank, world_size, path, point):
    """Save to one path after every second step; rank 0 is killed on the way."""
    module = Net(save={2: path, 4: path})
    with armed(point if rank == 0 else ""):
        fit(module, world_size, strategy(), plugins=[AtomicCheckpointIO()])


def resume_both(rank, world_size, path):
    """Resume from what is left, and from the first checkpoint as an undisturbed run writes it."""
    found = resume(rank, world_size, path)
    fit(Net(save={2: f"{path}.other"}), world_size, strategy())
    return found, fit(Net(), world_size, strategy(), f"{path}.other"), fit(Net(save={2: path, 4: path}), world_size, strategy())


@pytest.mark.parametrize(("hit", "where"), [(3, "its rank's file"), (4, "the checkpoint")])
def test_a_kill_while_it_overwrites_leaves_the_old_checkpoint_with_its_own_files(ranks, tmp_path, hit, where):
    path = str(tmp_path / "last.ckpt")
    with ranks.start(save_often, 2, path, f"atomic_write/replace=kill:{hit}") as handle:
        assert handle.join(30)[0] == -signal.SIGKILL, where
    assert torch.load(path, weights_only=True)["global_step"] == 2
    for (found, warned), expected, _ in ranks.run(resume_both, 2, path):
        assert warned == []
        assert_same(found, expected, where)
    tokens = os.listdir(f"{path}.ok_topk")
    assert len(tokens) == 2, "those of the newest checkpoint and of the one before"
    assert all(file.is_file() for file in rank_files(path))


def test_a_checkpoint_is_tensors_and_plain_values_and_its_token_cannot_lead_elsewhere(ranks, tmp_path):
    path = str(tmp_path / "a.ckpt")
    ranks.run(save_one, 2, path)
    for file in rank_files(path):
        assert torch.load(file, weights_only=True)["steps"] == 4
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["ok_topk"]["token"] = "../../elsewhere"
    torch.save(checkpoint, path)
    for said, _ in ranks.run(resume, 2, path):
        assert "InputError" in said
        assert "'../../elsewhere' as its folder of residuals, which it cannot have written" in said
