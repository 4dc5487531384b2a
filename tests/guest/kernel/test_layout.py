"""The guest's map: sizes by default, and a window where programs have nothing."""

from __future__ import annotations

import pytest

from penumbra.guest.kernel import LayoutError, default_layout
from penumbra.hw.formats import FORMATS, IA32, X86_64, FormatSpec

MIB = 1 << 20


@pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))
def test_small_programs_get_64_mib_with_8_of_them_for_tables(spec: FormatSpec) -> None:
    layout = default_layout(spec, 100)
    assert (layout.ram_bytes, layout.pool_frames) == (64 * MIB, 8 * MIB >> 12)
    layout.check(spec)


def test_large_programs_get_half_as_much_again_as_they_need() -> None:
    layout = default_layout(X86_64, 100_000)
    assert (layout.ram_bytes // MIB, layout.pool_frames * 4096 // MIB) == (586, 73)


def test_a_stack_near_4_gib_moves_the_window_below_it() -> None:
    stack = (0xFFFE_0, 0x20)
    layout = default_layout(IA32, 100, [stack])
    assert layout.window_end <= 0xFFC0_0000
    assert default_layout(IA32, 100).window_end > 0xFFC0_0000


def test_the_64_bit_window_is_in_the_upper_half_and_canonical() -> None:
    layout = default_layout(X86_64, 100)
    assert X86_64.canonical(layout.window_gva)
    assert X86_64.canonical(layout.window_end)
    assert layout.window_gva >> 63 == 1


def test_an_address_space_without_room_is_refused() -> None:
    everything = [(0, 1 << 20)]
    with pytest.raises(LayoutError, match="no free"):
        default_layout(IA32, 100, everything)


@pytest.mark.parametrize("pool_bytes", [64 * MIB, 16 * 4096])
def test_an_impossible_pool_is_refused(pool_bytes: int) -> None:
    with pytest.raises(LayoutError):
        default_layout(IA32, 100, pool_bytes=pool_bytes)
