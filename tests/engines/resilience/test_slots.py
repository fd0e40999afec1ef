"""Slots: what goes in comes out, and nothing else ever does."""

import json
import os
import random
import struct
import subprocess
import sys

import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience import slot_tensors, slots
from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES
from lightning_plugins.engines.resilience.host_memory import available_bytes
from lightning_plugins.engines.resilience.slots import HEADER_BYTES, DamagedError
from lightning_plugins.engines.resilience.state_tree import Packed, pack, unpack
from tests.engines.resilience.keeper_parts import assert_same, wide_state

HEADER_FIELDS_BYTES = 80  # magic 8, version 4, chunk 4, three lengths of 8, digest 32, generation 8


def filled(state, step=3, generation=7, meta=None):
    """Write a state into a block of its own as writer and keeper do, and return the block and its digest."""
    packed = pack(state)
    layout = slot_tensors.plan(packed, step, meta or {})
    descriptor = slots.make_block(layout.block_bytes, available_bytes)
    block = slots.map_block(descriptor, writable=True)
    os.close(descriptor)
    slots.invalidate(block)
    slot_tensors.copy_into(slot_tensors.views_into(block, packed, layout), packed.tensors, range(len(packed.tensors)))
    slot_tensors.write_rest(block, packed, layout)
    assert slots.generation_of(block) == 0
    _, digest = slots.seal_block(block, layout.data_bytes, len(layout.draft), generation)
    return block, digest


@pytest.fixture(scope="module")
def written():
    """Bytes of a slot of several chunks of random numbers, and its digest."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randint(0, 2**31, (CHUNK_BYTES // 4 + 100,), generator=generator, dtype=torch.int32) for _ in range(2)]
    block, digest = filled({"weights": weights, "odd": torch.ones(3)})
    return bytes(block), digest


def check(octets, digest, step=3, generation=7):
    return slots.check_block(memoryview(octets), "rank0", step, generation, digest)


def test_everything_comes_back_with_the_same_bits():
    state = wide_state()
    block, digest = filled(state, meta={"epoch": 2, "names": ["a", None], "share": 0.5})
    manifest = check(block, digest)
    assert_same(unpack(*slot_tensors.read_packed(block, manifest)), state)
    assert manifest["meta"] == {"epoch": 2, "names": ["a", None], "share": 0.5}


def test_an_empty_state():
    block, digest = filled({})
    assert unpack(*slot_tensors.read_packed(block, check(block, digest))) == {}


def test_what_is_read_is_a_copy():
    block, digest = filled({"a": torch.ones(5)})
    packed = slot_tensors.read_packed(block, check(block, digest))
    block[HEADER_BYTES : HEADER_BYTES + 20] = bytes(20)
    assert torch.equal(packed.tensors[0], torch.ones(5))


def test_the_format_is_what_is_written_down():
    """Read a block with nothing but ``struct`` and ``json``."""
    block, _ = filled({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3], dtype=torch.int64)}, step=5, generation=9)
    magic, version, chunk, data_bytes, offset, length, _, generation = struct.unpack_from("<8sIIQQQ32sQ", block)
    assert (magic, version, chunk, generation) == (b"LPSLOT\r\n", 1, 4 << 20, 9)
    manifest = json.loads(block[offset : offset + length])
    assert (manifest["step"], manifest["generation"], manifest["data_bytes"]) == (5, 9, data_bytes)
    assert manifest["tensors"] == [["float32", [2], 0, 8], ["int64", [1], 64, 8]]
    assert struct.unpack_from("<2f", block, 4096) == (1.0, 2.0)
    assert struct.unpack_from("<q", block, 4096 + 64) == (3,)


def test_a_flipped_bit_anywhere_is_found(written):
    octets, digest = written
    header = struct.unpack_from("<8sIIQQQ", octets)
    data_bytes, offset, length = header[3:]
    draws = random.Random(3)
    places = [*range(HEADER_FIELDS_BYTES), *draws.sample(range(offset, offset + length), 40)]
    places += [HEADER_BYTES + draws.randrange(data_bytes) for _ in range(15)] + [HEADER_BYTES, HEADER_BYTES + data_bytes - 1]
    for place in places:
        damaged = bytearray(octets)
        damaged[place] ^= 1 << draws.randrange(8)
        with pytest.raises(DamagedError) as caught:
            check(damaged, digest)
        in_data = HEADER_BYTES <= place < HEADER_BYTES + data_bytes
        assert caught.value.chunk == ((place - HEADER_BYTES) // CHUNK_BYTES if in_data else None)


def test_bytes_chunks_pages_and_lengths(written):
    octets, digest = written
    first, second = HEADER_BYTES, HEADER_BYTES + CHUNK_BYTES
    swapped = octets[:first] + octets[second : second + CHUNK_BYTES] + octets[first:second] + octets[second + CHUNK_BYTES :]
    page = bytearray(octets)
    page[second : second + 4096] = bytes(4096)
    octet = bytearray(octets)
    octet[second + 77] = (octet[second + 77] + 1) % 256
    for damaged, chunk in ((swapped, 0), (page, 1), (octet, 1)):
        with pytest.raises(DamagedError, match=rf"shard 'rank0' of step 3 is damaged: chunk {chunk} of") as caught:
            check(damaged, digest)
        assert (caught.value.shard, caught.value.step, caught.value.chunk) == ("rank0", 3, chunk)
    for length in (0, 100, HEADER_BYTES, HEADER_BYTES + CHUNK_BYTES, len(octets) - 4096):
        with pytest.raises(DamagedError):
            check(octets[:length], digest)
    zeroed = bytes(4096) + octets[4096:]
    with pytest.raises(DamagedError, match="header"):
        check(zeroed, digest)


def test_another_step_under_this_name_is_found():
    old, old_digest = filled({"a": torch.ones(3)}, step=10, generation=4)
    _, digest = filled({"a": torch.zeros(3)}, step=20, generation=5)
    with pytest.raises(DamagedError, match="not the one that was sealed"):
        check(old, digest, step=20, generation=5)
    with pytest.raises(DamagedError, match="holds step 10 in generation 4, not 20 in 5"):
        check(old, old_digest, step=20, generation=5)
    with pytest.raises(DamagedError, match="not 10 in 5"):
        check(old, old_digest, step=10, generation=5)


def test_what_is_being_written_is_not_whole():
    block, digest = filled({"a": torch.ones(3)})
    slots.invalidate(block)
    with pytest.raises(DamagedError):
        check(block, digest)


def test_nobody_can_cut_a_block_short():
    descriptor = slots.make_block(10_000, available_bytes)
    try:
        assert os.fstat(descriptor).st_size == 12288
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 4096)
        assert os.fstat(descriptor).st_blocks * 512 == 12288  # all pages are present
    finally:
        os.close(descriptor)


def test_a_block_that_outgrows_the_host_is_given_up_on_its_way():
    """The host says each time that it has 64 MiB less: three steps of 64 MiB are taken, and given back."""
    left = iter(range(200 << 20, 0, -(64 << 20)))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=f"only {192 << 20} of {1 << 30} bytes were there"):
        slots.make_block(1 << 30, lambda: next(left))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "draft",
    [
        b"not json",
        b"[]",
        b'{"step":1}',
        b'{"step":"1","meta":{},"skeleton":[0,1],"tensors":[]}',
        b'{"step":1,"meta":{},"skeleton":[0,11],"tensors":[]}',
        b'{"step":1,"meta":{},"skeleton":[-1,1],"tensors":[]}',
        b'{"step":1,"meta":{},"skeleton":[0,1],"tensors":[["float32",[1],8,4]]}',
    ],
)
def test_a_draft_that_is_none_is_not_sealed(draft):
    descriptor = slots.make_block(20_000, available_bytes)
    block = slots.map_block(descriptor, writable=True)
    os.close(descriptor)
    offset, _ = slots.manifest_place(10, len(draft))
    block[offset : offset + len(draft)] = draft
    with pytest.raises((ValueError, KeyError, TypeError)):
        slots.seal_block(block, 10, len(draft), 1)
    assert slots.generation_of(block) == 0
    with pytest.raises(ValueError, match="do not fit"):
        slots.seal_block(block, 1 << 40, len(draft), 1)


def test_meta_of_other_kinds_is_refused():
    with pytest.raises(InputError, match="meta takes numbers, strings"):
        slot_tensors.plan(Packed(b"", []), 1, {"a": torch.ones(1)})


def test_the_keepers_side_imports_no_torch():
    names = ("checksums", "slots", "messages", "keeper")
    program = "; ".join(f"import lightning_plugins.engines.resilience.{name}" for name in names)
    program += "; import sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == 0
