"""Entries through every code and back: what arrives is what was rounded, where it was, in the length that was announced."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.engines.sparse_allreduce.wire import ALIGNMENT, CODES, MOST_ELEMENTS, Wire
from tests.engines.sparse_allreduce.oracle import nearest_bfloat16

FLOAT32_MAX = float(np.finfo(np.float32).max)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def entries(draw):
    """Return sorted positions, a span that holds them, and values."""
    gaps = draw(st.lists(st.one_of(st.integers(1, 40), st.integers(65_530, 65_540), st.integers(1, 300_000)), max_size=30))
    positions = np.cumsum([draw(st.sampled_from([0, 1, 65_534, 65_535, 65_536, 200_000])), *gaps])[: len(gaps)]
    span = int(positions[-1]) + draw(st.integers(1, 20)) if len(positions) else draw(st.integers(0, 50))
    values = draw(st.lists(floats.filter(bool), min_size=len(positions), max_size=len(positions)))
    return torch.from_numpy(positions.astype(np.int64)), span, torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", ["exact", "bfloat16"])
@pytest.mark.parametrize("indices", [*CODES, "auto"])
@given(drawn=st.lists(entries(), min_size=1, max_size=3), start=st.sampled_from([0, 5, 1 << 40]))
@settings(max_examples=25, deadline=None)
def test_round_trip(indices, values, dtype, drawn, start):
    """Several messages end to end, as they arrive: each has to be readable where it lies."""
    wire = Wire(indices, values, dtype)
    sent = [(positions + start, span, wire.rounded(of_entry.to(dtype))) for positions, span, of_entry in drawn]
    coded = [wire.encode(positions, of_entry, start, span) for positions, span, of_entry in sent]
    lengths = [wire.message_bytes(header, span) for (header, _), (_, span, _) in zip(coded, sent, strict=True)]
    assert lengths == [len(message) for _, message in coded]
    assert all(length % ALIGNMENT == 0 for length in lengths)
    received = torch.cat([message for _, message in coded]).split(lengths)
    for (header, _), message, (positions, span, of_entry) in zip(coded, received, sent, strict=True):
        places, arrived = wire.decode(header, message, start, span)
        assert torch.equal(places, positions[of_entry != 0])
        assert torch.equal(arrived, of_entry[of_entry != 0])
        assert arrived.dtype == dtype
        assert wire.entries(header) >= len(positions)


def test_far_positions_take_fillers():
    """A distance above 65,535 is walked in entries of value 0, which are counted and do not arrive."""
    wire = Wire("delta16", "exact", torch.float32)
    for positions, fillers in (([65_535], 0), ([65_536], 1), ([131_070], 1), ([131_071], 2), ([0, 65_535, 131_071], 1)):
        header, message = wire.encode(torch.tensor(positions), torch.ones(len(positions)), 0, 1 << 20)
        assert wire.entries(header) == len(positions) + fillers
        places, values = wire.decode(header, message, 0, 1 << 20)
        assert (places.tolist(), values.tolist()) == (positions, [1.0] * len(positions))


def test_positions_beyond_a_sign_bit():
    """A region of more than 2^31 places; nothing of it is laid out in memory."""
    positions = torch.tensor([5, (1 << 31) - 1, 1 << 31, MOST_ELEMENTS - 1])
    for indices in ("int32", "auto"):
        wire = Wire(indices, "exact", torch.float32)
        header, message = wire.encode(positions, torch.ones(4), 0, MOST_ELEMENTS)
        assert wire.decode(header, message, 0, MOST_ELEMENTS)[0].tolist() == positions.tolist()


@pytest.mark.parametrize("span", range(1, 18))
def test_bitmaps_of_any_length(span):
    wire = Wire("bitmap", "exact", torch.float32)
    for positions in ([0], [span - 1], list(range(span))):
        positions = sorted(set(positions))
        header, message = wire.encode(torch.tensor(positions) + 7, torch.arange(1.0, len(positions) + 1), 7, span)
        assert len(message) == -(-(4 * len(positions) + -(-span // 8)) // 8) * 8
        places, values = wire.decode(header, message, 7, span)
        assert (places - 7).tolist() == positions
        assert values.tolist() == list(range(1, len(positions) + 1))


@pytest.mark.parametrize("code", CODES)
def test_nothing_is_a_message_too(code):
    wire = Wire(code, "bfloat16", torch.float32)
    nothing = torch.empty(0, dtype=torch.int64)
    for span in (0, 9):
        header, message = wire.encode(nothing, torch.empty(0), 3, span)
        assert wire.entries(header) == 0
        assert [len(part) for part in wire.decode(header, message, 3, span)] == [0, 0]


@pytest.mark.parametrize(("density", "code"), [(0.00001, "int32"), (0.01, "delta16"), (0.3, "bitmap")])
def test_auto_takes_the_shortest(density, code):
    """int32 where distances are long, a bitmap where a bit for each place costs less than 16 for each entry."""
    span = 1_000_000
    positions = torch.arange(0, span, round(1 / density)) + 1
    values = torch.ones(len(positions))
    lengths = {}
    for indices in [*CODES, "auto"]:
        header, message = Wire(indices, "exact", torch.float32).encode(positions, values, 0, span + 2)
        lengths[indices] = len(message)
    assert header % len(CODES) == CODES.index(code)
    assert lengths["auto"] == lengths[code] == min(lengths.values())


@given(st.lists(floats, min_size=1, max_size=20))
def test_rounding_is_to_the_nearest_and_its_error_exact(values):
    """Also of denormals, and of the largest numbers, which stay finite."""
    wire = Wire("auto", "bfloat16", torch.float32)
    given_values = torch.tensor(values, dtype=torch.float32)
    rounded = wire.rounded(given_values)
    assert np.array_equal(rounded.numpy(), nearest_bfloat16(given_values.numpy()))
    for value, near, error in zip(given_values.tolist(), rounded.tolist(), (given_values - rounded).tolist(), strict=True):
        assert Fraction(value) == Fraction(near) + Fraction(error)


def test_the_ends_of_the_range():
    wire = Wire("auto", "bfloat16", torch.float32)
    values = torch.tensor([FLOAT32_MAX, -FLOAT32_MAX, 2.0**-149, 2.0**-133, 3 * 2.0**-134, 2.0**-134, float("inf")])
    largest = (2 - 2.0**-7) * 2.0**127
    assert wire.rounded(values).tolist() == [largest, -largest, 0.0, 2.0**-133, 2.0**-132, 0.0, float("inf")]
    assert torch.equal(Wire("auto", "exact", torch.float32).rounded(values), values)


def test_what_is_rounded_to_nothing_does_not_arrive():
    wire = Wire("int32", "bfloat16", torch.float32)
    header, message = wire.encode(torch.tensor([2, 5]), wire.rounded(torch.tensor([2.0**-149, 1.0])), 0, 8)
    places, values = wire.decode(header, message, 0, 8)
    assert (places.tolist(), values.tolist()) == ([5], [1.0])
