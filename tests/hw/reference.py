"""A page walker that is plainly right: no TLB, no tables of bits, written from the SDM's pages.

It shares nothing with the hardware under test, constants included. One function per paging mode
(SDM vol. 3, 4.3 with Table 4-2, 4-4, 4-5, 4-6; 4.5 with Tables 4-15 to 4-20; 4.6 and 4.7), over a
dictionary of memory words. MAXPHYADDR is 40.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

READ, WRITE, FETCH = 0, 1, 2


@dataclass(frozen=True)
class Modes:
    """The control bits a walk looks at."""

    wp: bool = True
    pse: bool = True
    pge: bool = True
    nxe: bool = True


@dataclass(frozen=True)
class Walked:
    """What an access comes to: a physical address, or an error code with CR2.

    `after` holds the words that accessed and dirty bits changed.
    """

    physical: int | None
    error: int = 0
    cr2: int = 0
    after: tuple[tuple[int, int], ...] = ()


Read = Callable[[int], int]


def walk_ia32(read: Read, cr3: int, modes: Modes, gva: int, kind: int, user: bool) -> Walked:
    """Translate by 32-bit paging; `read` returns the dword at a physical address."""
    code = (2 if kind == WRITE else 0) | (4 if user else 0)
    pde_at = (cr3 & 0xFFFFF000) + 4 * (gva >> 22)
    pde = read(pde_at)
    if pde & 1 == 0:
        return Walked(None, code, gva)
    if pde & 0x80 and modes.pse:
        if pde & 0x0020_0000:
            return Walked(None, code | 8 | 1, gva)
        high = (pde >> 13) & 0xFF
        physical = (high << 32) | (pde & 0xFFC0_0000) | (gva & 0x3F_FFFF)
        path = [(pde_at, pde)]
    else:
        pte_at = (pde & 0xFFFFF000) + 4 * ((gva >> 12) & 0x3FF)
        pte = read(pte_at)
        if pte & 1 == 0:
            return Walked(None, code, gva)
        physical = (pte & 0xFFFFF000) | (gva & 0xFFF)
        path = [(pde_at, pde), (pte_at, pte)]
    if not _permitted(path, modes, kind, user):
        return Walked(None, code | 1, gva)
    return Walked(physical, after=_accessed_and_dirty(path, kind))


def walk_4level(read: Read, cr3: int, modes: Modes, gva: int, kind: int, user: bool) -> Walked:
    """Translate by 4-level paging; `read` returns the qword at a physical address."""
    code = (2 if kind == WRITE else 0) | (4 if user else 0)
    if kind == FETCH and modes.nxe:
        code |= 16
    table = cr3 & 0x000F_FFFF_FFFF_F000
    path: list[tuple[int, int]] = []
    physical = -1
    for shift, page_mask in ((39, None), (30, 0x3FFF_FFFF), (21, 0x1F_FFFF), (12, 0xFFF)):
        at = table + 8 * ((gva >> shift) & 0x1FF)
        entry = read(at)
        if entry & 1 == 0:
            return Walked(None, code, gva)
        path.append((at, entry))
        page = shift == 12 or (page_mask is not None and entry & 0x80 != 0)
        reserved = 0x000F_FF00_0000_0000
        if shift == 39:
            reserved |= 0x80
        elif page and page_mask is not None and shift > 12:
            reserved |= page_mask & ~0x1FFF  # bit 12 is PAT
        if not modes.nxe:
            reserved |= 1 << 63
        if entry & reserved:
            return Walked(None, code | 8 | 1, gva)
        if page:
            assert page_mask is not None
            physical = (entry & 0x000F_FFFF_FFFF_F000 & ~page_mask) | (gva & page_mask)
            break
        table = entry & 0x000F_FFFF_FFFF_F000
    if not _permitted(path, modes, kind, user):
        return Walked(None, code | 1, gva)
    if kind == FETCH and modes.nxe and any(entry >> 63 for _, entry in path):
        return Walked(None, code | 1, gva)
    return Walked(physical, after=_accessed_and_dirty(path, kind))


def walk_pae(
    read: Read, registers: list[int], modes: Modes, gva: int, kind: int, user: bool
) -> Walked:
    """Translate by PAE paging; `registers` hold the PDPTEs, which have no rights and no A."""
    code = (2 if kind == WRITE else 0) | (4 if user else 0)
    if kind == FETCH and modes.nxe:
        code |= 16
    pdpte = registers[gva >> 30]
    if pdpte & 1 == 0:
        return Walked(None, code, gva)
    reserved = 0x7FFF_FF00_0000_0000 | (0 if modes.nxe else 1 << 63)
    pde_at = (pdpte & 0xFF_FFFF_F000) + 8 * (gva >> 21 & 511)
    pde = read(pde_at)
    path = [(pde_at, pde)]
    if pde & 1 == 0:
        return Walked(None, code, gva)
    if pde & 0x80:
        if pde & (reserved | 0x1F_E000):
            return Walked(None, code | 9, gva)
        physical = pde & 0xFF_FFE0_0000 | gva & 0x1F_FFFF
    else:
        if pde & reserved:
            return Walked(None, code | 9, gva)
        pte_at = (pde & 0xFF_FFFF_F000) + 8 * (gva >> 12 & 511)
        pte = read(pte_at)
        path.append((pte_at, pte))
        if pte & 1 == 0:
            return Walked(None, code, gva)
        if pte & reserved:
            return Walked(None, code | 9, gva)
        physical = pte & 0xFF_FFFF_F000 | gva & 0xFFF
    if not _permitted(path, modes, kind, user):
        return Walked(None, code | 1, gva)
    if kind == FETCH and modes.nxe and any(entry >> 63 for _, entry in path):
        return Walked(None, code | 1, gva)
    return Walked(physical, after=_accessed_and_dirty(path, kind))


def _permitted(path: list[tuple[int, int]], modes: Modes, kind: int, user: bool) -> bool:
    may_user = all(entry & 4 for _, entry in path)
    may_write = all(entry & 2 for _, entry in path)
    if user and not may_user:
        return False
    return kind != WRITE or may_write or not (user or modes.wp)


def _accessed_and_dirty(path: list[tuple[int, int]], kind: int) -> tuple[tuple[int, int], ...]:
    """Return the words as they stand afterwards; one word may be on the path twice."""
    words: dict[int, int] = {}
    for at, entry in path:
        words[at] = words.get(at, entry) | 0x20
    if kind == WRITE:
        words[path[-1][0]] |= 0x40
    return tuple(sorted(words.items()))
