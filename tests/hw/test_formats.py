"""The format tables agree with themselves and with the manual's figures."""

from __future__ import annotations

import pytest

from penumbra.hw.formats import FORMATS, IA32, PAE, X86_64, FormatSpec

from .rig import NX, P, U, W


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("spec", FORMATS.values(), ids=lambda spec: spec.name)
def test_the_levels_of_a_format_cover_every_address_bit_once(spec: FormatSpec) -> None:
    shift = 12
    for level in spec.levels:
        assert level.shift == shift
        in_registers = spec.root_registers and level is spec.levels[spec.top]
        assert level.n_entries * spec.entry_bytes == (32 if in_registers else 4096)
        shift += level.index_bits
    assert shift == spec.va_bits
    assert spec.top == len(spec.levels) - 1
    last = (1 << spec.va_bits) - 1
    assert all(level.index(last) == level.n_entries - 1 for level in spec.levels)


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("spec", [IA32, X86_64, PAE], ids=lambda spec: spec.name)
def test_no_bit_is_reserved_that_rights_or_a_small_frame_use(spec: FormatSpec) -> None:
    for level in spec.levels:
        reserved = level.reserved | (level.reserved_large if level.large else 0)
        # A top level in registers has no rights: what would be W and U is reserved.
        in_registers = spec.root_registers and level is spec.levels[spec.top]
        assert reserved & (P | NX if in_registers else P | W | U | NX) == 0
        assert 0 <= reserved < 1 << 63
        assert level.reserved & spec.frame_mask & ((1 << 40) - 1) == 0
        assert level.large or level.reserved_large == 0
    assert not spec.may_cache_not_present


@pytest.mark.shows("H3")
def test_an_address_is_canonical_when_bits_63_to_47_are_equal() -> None:
    last_low, first_high = (1 << 47) - 1, (1 << 64) - (1 << 47)
    yes = (0, last_low, first_high, (1 << 64) - 1)
    no = (last_low + 1, first_high - 1, 1 << 64, -1)
    assert [X86_64.canonical(gva) for gva in (*yes, *no)] == [True] * 4 + [False] * 4


@pytest.mark.shows("H2")
def test_a_32_bit_address_has_32_bits() -> None:
    assert [IA32.canonical(gva) for gva in (0, (1 << 32) - 1, 1 << 32, -1)] == [
        True, True, False, False,
    ]  # fmt: skip
