"""What a VCPU's derived tables hold: the translations its CPU finds if it walks them now.

Read from machine RAM, as the hardware reads them, and from no book of the monitor's. It is the
content of a virtual TLB, or the part of a shadow that hangs from the root in use.

Source: A40 ¶34, ¶38 (VTLB 294); VTLB Figs 4, 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from penumbra.hw.formats import NX, PAGE_BYTES, PAGE_SHIFT, PS, FormatSpec, G, P, U, W
from penumbra.hw.memory import Ram

ForWhom: TypeAlias = Literal["both", "user", "supervisor"]


@dataclass(frozen=True, order=True)
class Translation:
    """One translation.

    Attributes:
        gva: First address it translates.
        n_pages: How many pages of 4 KiB it translates.
        pfn: The first one's machine frame.
        writable, user, executable: Rights of all levels together.
        is_global: Whether a root load leaves it in the hardware's TLB.
        serves: Privilege in which the CPU walks the tables it stands in.
    """

    gva: int
    n_pages: int
    pfn: int
    writable: bool
    user: bool
    executable: bool
    is_global: bool = False
    serves: ForWhom = "both"


def translations(
    spec: FormatSpec, ram: Ram, root: int, serves: ForWhom = "both"
) -> list[Translation]:
    """Return what the tables at machine address `root` translate, by address upwards."""
    rights = W | U | (NX if spec.has_nx else 0)
    return list(_below(spec, ram, root, spec.top, 0, rights, serves))


def _below(
    spec: FormatSpec, ram: Ram, base: int, level: int, gva: int, rights: int, serves: ForWhom
) -> Iterator[Translation]:
    """Go through one table; bits of `rights` are what the levels above permit, NX inverted."""
    lev = spec.levels[level]
    in_registers = bool(spec.root_registers) and level == spec.top
    for index in range(lev.n_entries):
        entry = ram.load(base + index * spec.entry_bytes, spec.entry_bytes)
        if not entry & P:
            continue
        at = gva | index << lev.shift
        # The entries of a top level that CPUs hold in registers carry no rights.
        now = rights if in_registers else rights & (entry ^ (NX if spec.has_nx else 0))
        large = level > 0 and lev.large and bool(entry & PS)
        if level and not large:
            table = entry & spec.frame_mask
            yield from _below(spec, ram, table, level - 1, at, now, serves)
            continue
        n_pages = 1 << (lev.shift - PAGE_SHIFT)
        pfn = (entry & spec.frame_mask & -(n_pages * PAGE_BYTES)) >> PAGE_SHIFT
        yield Translation(
            _canonical(spec, at), n_pages, pfn, bool(now & W), bool(now & U),
            not spec.has_nx or bool(now & NX), bool(entry & G), serves,
        )  # fmt: skip


def _canonical(spec: FormatSpec, gva: int) -> int:
    if spec.sign_extended and gva >> (spec.va_bits - 1):
        return gva | ((1 << 64) - (1 << spec.va_bits))
    return gva
