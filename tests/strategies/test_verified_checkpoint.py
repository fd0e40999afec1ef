"""Checkpoints that carry a checksum: ordinary for everybody else, and no damage of theirs is loaded."""

import os
import random
import signal
import warnings
import zipfile

import pytest
import torch

from lightning_plugins._lightning import Trainer, seed_everything, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import armed
from lightning_plugins.engines.resilience.disk import write_step
from lightning_plugins.engines.resilience.shards import split
from lightning_plugins.engines.resilience.slots import DamagedError
from lightning_plugins.strategies.verified_checkpoint import VerifiedCheckpointIO
from tests.engines.resilience.keeper_parts import assert_same

pytestmark = pytest.mark.adapter


def checkpoint(value=1, numbers=5):
    return {"global_step": value, "state_dict": {"weight": torch.full((numbers,), float(value))}}


def test_what_was_saved_is_loaded_and_is_an_ordinary_file(tmp_path):
    io, path = VerifiedCheckpointIO(), tmp_path / "made" / "a.ckpt"
    io.save_checkpoint(checkpoint(3, 3_000_000), path)  # three chunks
    for loaded in (
        io.load_checkpoint(path),
        io.load_checkpoint(path, map_location="cpu", weights_only=True),
        submodule("plugins.io").TorchCheckpointIO().load_checkpoint(path),
        torch.load(path, weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
    ):
        assert loaded["global_step"] == 3
        assert torch.equal(loaded["state_dict"]["weight"], torch.full((3_000_000,), 3.0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"lightning-plugins crc32/4MiB sha256 ")
    assert os.listdir(path.parent) == ["a.ckpt"]
    io.remove_checkpoint(path)
    assert os.listdir(path.parent) == []
    assert "VerifiedCheckpointIO() [built for" in repr(io)


def test_every_bit_is_covered(tmp_path):
    """Of a small file every one, of a large one some."""
    io, path = VerifiedCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(checkpoint(), path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"a\.ckpt is damaged: it ") as raised:
            io.load_checkpoint(path)
        assert "\n" not in str(raised.value)
    path.write_bytes(whole)
    assert io.load_checkpoint(path)["global_step"] == 1


def cut(data, draws):
    return data[: draws.randrange(1, len(data))]


def lengthen(data, draws):
    return data + bytes(draws.randrange(1, 5000))


def zero(data, draws):
    start = draws.randrange(len(data) // 4096) * 4096
    return data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]


def swap(data, draws):
    one, other = (512 * draws.randrange(4, len(data) // 512) for _ in range(2))
    both = bytearray(data)
    both[one : one + 512], both[other : other + 512] = data[other : other + 512], data[one : one + 512]
    return bytes(both)


@pytest.mark.parametrize("damage", [cut, lengthen, zero, swap], ids=lambda damage: damage.__name__)
def test_larger_damage(tmp_path, damage):
    io, path, draws = VerifiedCheckpointIO(), tmp_path / "a.ckpt", random.Random(3)
    io.save_checkpoint({"weight": torch.rand(1_500_000)}, path)
    whole = path.read_bytes()
    for _ in range(20):
        damaged = damage(whole, draws)
        path.write_bytes(damaged)
        if damaged == whole:
            continue
        with pytest.raises(DamagedError, match=r"a\.ckpt is damaged"):
            io.load_checkpoint(path)


def test_what_stock_lightning_makes_of_a_flipped_bit(tmp_path):
    """The failing control: if this ever raises, half of the point of this plugin is gone."""
    path = tmp_path / "a.ckpt"
    VerifiedCheckpointIO().save_checkpoint(checkpoint(1, 1000), path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((10,), 1.0).numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    loaded = submodule("plugins.io").TorchCheckpointIO().load_checkpoint(path)
    assert not torch.equal(loaded["state_dict"]["weight"], torch.full((1000,), 1.0))


def test_a_file_without_a_checksum_loads_with_one_warning(tmp_path):
    io, path, legacy = VerifiedCheckpointIO(), tmp_path / "a.ckpt", tmp_path / "old.ckpt"
    torch.save(checkpoint(2), path)
    torch.save(checkpoint(2), legacy, _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match=r"a\.ckpt has no checksum"):
        assert io.load_checkpoint(path)["global_step"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert io.load_checkpoint(path)["global_step"] == 2
        assert io.load_checkpoint(legacy)["global_step"] == 2
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        io.load_checkpoint(tmp_path / "none.ckpt")


def save_twice(rank, world_size, path):
    with armed("atomic_write/replace=kill:2"):
        VerifiedCheckpointIO().save_checkpoint(checkpoint(1), path)
        VerifiedCheckpointIO().save_checkpoint(checkpoint(2), path)


def test_a_kill_or_a_full_disk_leaves_the_old_checkpoint(ranks, tmp_path):
    io, path = VerifiedCheckpointIO(), tmp_path / "a.ckpt"
    with ranks.start(save_twice, 1, path) as handle:
        assert handle.join(30) == [-signal.SIGKILL]
    assert io.load_checkpoint(path)["global_step"] == 1
    with armed("atomic_write/replace=full"), pytest.raises(OSError, match="No space left"):
        io.save_checkpoint(checkpoint(2), path)
    assert io.load_checkpoint(path)["global_step"] == 1
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(checkpoint(1), path, storage_options={})


# In a Trainer


class Remembering(torch.utils.data.DataLoader):
    """A loader with a state, which says which state it was given."""

    given = None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        Remembering.given = state


class Sum(submodule("demos.boring_classes").BoringModel):
    """Learns something with a state in its optimizer; keeps its losses."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(64.0).reshape(2, 32).repeat(8, 1) / 64)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def trainer(folder, steps, **settings):
    return Trainer(
        default_root_dir=folder,
        max_steps=steps,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"devices": 1, "plugins": [VerifiedCheckpointIO()]} | settings),
    )


def write_shards(folder, checkpoint, ranks=1, loaders=lambda rank: None):
    """Write a checkpoint as MemoryCheckpoint has it written: what replicas share, and each rank's own."""
    shards = {}
    for rank in range(ranks):
        state = {**checkpoint, "exact_resume": {"batches": 4}, "rank_state": None}
        fit_loop = checkpoint["loops"]["fit_loop"]
        with_loader = {**fit_loop["state_dict"], **({"combined_loader": loaders(rank)} if loaders(rank) else {})}
        state["loops"] = {**checkpoint["loops"], "fit_loop": {**fit_loop, "state_dict": with_loader}}
        shards["shared"], shards[f"rank{rank}"] = split(state, {"layer.weight", "layer.bias"})
    return write_step(folder, 4, shards)


def fit(folder, steps, path=None, **settings):
    seed_everything(7)
    model = Sum()
    run = trainer(folder, steps, **settings)
    run.fit(model, ckpt_path=path)
    return run, model


@pytest.fixture
def whole_and_half(tmp_path):
    """The losses of eight steps, and the checkpoint after four."""
    _, whole = fit(tmp_path, 8)
    run, _ = fit(tmp_path, 4)
    run.save_checkpoint(tmp_path / "half.ckpt")
    return whole.losses, tmp_path / "half.ckpt"


@pytest.mark.filterwarnings("ignore")
def test_fit_goes_on_from_a_file_and_from_a_step(whole_and_half, tmp_path):
    losses, path = whole_and_half
    _, resumed = fit(tmp_path, 8, path)
    assert resumed.losses == losses[4:]
    half = torch.load(path, weights_only=True)
    step = write_shards(tmp_path, half)
    found = VerifiedCheckpointIO().load_checkpoint(step)
    assert set(found) == set(half)
    half["state_dict"] = dict(half["state_dict"])
    for name in found:
        assert_same(found[name], half[name], name)
    run, resumed = fit(tmp_path, 8, step)
    assert resumed.losses == losses[4:]
    assert run.global_step == 8
    data = bytearray((step / "shared.distcp").read_bytes())
    data[1000] ^= 1
    (step / "shared.distcp").write_bytes(data)
    with pytest.raises(DamagedError, match=r"step-000000004/shared\.distcp is damaged: it differs in its chunk 0 of 1"):
        fit(tmp_path, 8, step)
    with pytest.raises(InputError, match=r"holds 1 steps; give one of them, .*step-000000004 is the newest"):
        VerifiedCheckpointIO().load_checkpoint(tmp_path)


class SumRemembering(Sum):
    def train_dataloader(self):
        return Remembering(super().train_dataloader().dataset)


def go_on(rank, world_size, folder, step):
    warnings.simplefilter("ignore")
    model = SumRemembering()
    run = trainer(folder, 8, strategy="ddp", devices=world_size, plugins=[VerifiedCheckpointIO()], use_distributed_sampler=False)
    run.fit(model, ckpt_path=step)
    return model.losses, run.global_step, Remembering.given


@pytest.mark.filterwarnings("ignore")
def test_fit_goes_on_under_ddp_with_each_ranks_loaders(ranks, whole_and_half, tmp_path):
    _, path = whole_and_half
    half = torch.load(path, weights_only=True)
    step = write_shards(tmp_path, half, 2, lambda rank: [{"rank": rank}])
    one, other = ranks.run(go_on, 2, tmp_path, step, init=False, timeout_s=120)
    assert (one[1:], other[1:]) == ((8, {"rank": 0}), (8, {"rank": 1}))
    assert one[0] == other[0]
    assert len(one[0]) == 4
