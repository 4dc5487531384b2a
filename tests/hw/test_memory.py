"""RAM is a row of bytes seen in three widths; beyond its end there is nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw.memory import Ram

N_FRAMES, PAGE = 2, 4096
END = N_FRAMES * PAGE
sizes = st.sampled_from([1, 2, 4, 8])


places = st.integers(0, END - 8) | st.integers(END - 8, END - 1)


@pytest.mark.shows("H1")
@settings(deadline=None)
@given(steps=st.lists(st.tuples(places, sizes)))
def test_stores_of_any_size_at_any_place_act_as_on_a_bytearray(
    steps: list[tuple[int, int]],
) -> None:
    ram, row = Ram(N_FRAMES), bytearray(END)
    ram.check()
    for number, (hpa, size) in enumerate(steps, 1):
        if hpa % PAGE + size > PAGE:
            hpa &= ~7  # an access that crosses a page is two of them
        value = number * 0x9E37_79B9_7F4A_7C15 & ((1 << 8 * size) - 1)
        ram.store(hpa, size, value)
        row[hpa : hpa + size] = value.to_bytes(size, "little")
        assert ram.load(hpa, size) == value
        assert ram.load(hpa & ~7, 8) == int.from_bytes(row[hpa & ~7 : (hpa & ~7) + 8], "little")
    assert bytes(ram.bytes) == row
    assert bytes(ram.u64) == bytes(ram.u32) == bytes(ram.i64) == row
    ram.clear_frame(1)
    assert bytes(ram.bytes) == row[:PAGE] + bytes(PAGE)


@pytest.mark.shows("H1")
@pytest.mark.parametrize("hpa", [END, END + 5, 1 << 39, (1 << 40) - 8])
def test_beyond_the_end_reads_are_all_ones_and_stores_vanish(hpa: int) -> None:
    ram = Ram(N_FRAMES)
    for size in (1, 2, 4, 8):
        ram.store(hpa, size, 5)
        assert ram.load(hpa, size) == (1 << 8 * size) - 1
    assert bytes(ram.bytes) == bytes(END)


@pytest.mark.shows("H1")
@pytest.mark.parametrize("n_frames", [0, -1])
def test_memory_of_no_frames_is_refused(n_frames: int) -> None:
    with pytest.raises(ValueError, match=f"at least one frame, got {n_frames}"):
        Ram(n_frames)
