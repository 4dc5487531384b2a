"""The ring of byte records, against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.actors.core.ring import RingReader, RingWriter, ring_words

BYTES = 13


@given(st.integers(1, 5), st.lists(st.one_of(st.none(), st.binary(max_size=BYTES)), max_size=60))
def test_a_ring_is_a_bounded_queue_even_when_its_ends_are_made_anew(
    capacity: int, acts: list[bytes | None]
) -> None:
    words = memoryview(bytearray(8 * ring_words(capacity, BYTES))).cast("Q")
    expected: list[bytes] = []
    writer, reader = RingWriter(words, capacity, BYTES), RingReader(words, capacity, BYTES)
    for number, act in enumerate(acts):
        if act is None:
            assert reader.is_empty == (not expected)
            assert reader.drain() == expected
            expected.clear()
        else:
            assert writer.offer(act) == (len(expected) < capacity)
            expected += [act] if len(expected) < capacity else []
        if number % 7 == 6:
            writer, reader = RingWriter(words, capacity, BYTES), RingReader(words, capacity, BYTES)
        writer.check()
    assert reader.drain() == expected


def test_a_record_longer_than_a_slot_is_refused_and_not_written() -> None:
    words = memoryview(bytearray(8 * ring_words(2, BYTES))).cast("Q")
    writer, reader = RingWriter(words, 2, BYTES), RingReader(words, 2, BYTES)
    with pytest.raises(ValueError, match="a record of 14 bytes: at most 13"):
        writer.offer(bytes(14))
    assert reader.drain() == []


@pytest.mark.parametrize(("capacity", "record_bytes"), [(0, 8), (1, 0), (1, 65537)])
def test_a_ring_without_room_is_refused(capacity: int, record_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"capacity = {capacity}, record_bytes = {record_bytes}:"):
        ring_words(capacity, record_bytes)
