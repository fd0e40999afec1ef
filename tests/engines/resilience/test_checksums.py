"""Checksums against the polynomial division that defines CRC-32, and every kind of damage."""

import random

import pytest

from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES, chunk_checksums, first_damage, manifest_digest


def crc32_by_division(data):
    """Divide by the polynomial bit by bit, lowest first, as ISO 3309 says."""
    remainder = 0xFFFFFFFF
    for octet in data:
        remainder ^= octet
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0xEDB88320 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


@pytest.fixture(scope="module")
def data():
    return random.Random(1).randbytes(2 * CHUNK_BYTES + 1000)


def test_each_chunk_has_its_crc(data):
    assert chunk_checksums(b"123456789") == [0xCBF43926]
    assert chunk_checksums(data)[2] == crc32_by_division(data[2 * CHUNK_BYTES :])
    assert chunk_checksums(data)[:2] == chunk_checksums(data[: 2 * CHUNK_BYTES])
    assert len(chunk_checksums(data)) == 3
    assert chunk_checksums(b"") == []


def test_what_is_whole_is_not_damaged(data):
    assert first_damage(data, chunk_checksums(data)) is None
    assert first_damage(memoryview(bytearray(data)), chunk_checksums(data)) is None
    assert first_damage(b"", []) is None


def test_every_damage_is_found_in_its_chunk(data):
    checksums = chunk_checksums(data)
    draws = random.Random(2)
    for _ in range(20):
        place = draws.randrange(len(data))
        damaged = bytearray(data)
        damaged[place] ^= 1 << draws.randrange(8)
        assert first_damage(damaged, checksums) == place // CHUNK_BYTES
    zeroed = bytearray(data)
    zeroed[CHUNK_BYTES + 4096 : CHUNK_BYTES + 8192] = bytes(4096)
    assert first_damage(zeroed, checksums) == 1
    swapped = data[CHUNK_BYTES : 2 * CHUNK_BYTES] + data[:CHUNK_BYTES] + data[2 * CHUNK_BYTES :]
    assert first_damage(swapped, checksums) == 0


@pytest.mark.parametrize(("length", "chunk"), [(0, 0), (CHUNK_BYTES, 1), (2 * CHUNK_BYTES, 2), (2 * CHUNK_BYTES + 999, 2)])
def test_what_is_cut_short_is_damaged(data, length, chunk):
    assert first_damage(data[:length], chunk_checksums(data)) == chunk


def test_what_is_too_long_is_damaged(data):
    assert first_damage(data, chunk_checksums(data)[:2]) == 2
    assert first_damage(data + b"\0", chunk_checksums(data)) == 2


def test_the_digest_is_sha256():
    assert manifest_digest(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
