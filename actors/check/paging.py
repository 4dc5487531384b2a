"""Paging formats as the oracle knows them: its own bits, its own tables, its own rules of rights.

Nothing here is shared with the hardware or the VMM, so that a slip in one of them cannot hide in
the judge as well. Levels count from the leaf up. A `Mode` is what the control registers say about
the reading of entries; it changes only at events that empty every cache of translations.

    ia32     level 1 PDE  31:22 (4 MiB with PS, CR4.PSE)   level 0 PTE 21:12      4-byte entries
    x86-64   level 3 PML4E 47:39, level 2 PDPTE 38:30 (1 GiB), level 1 PDE 29:21 (2 MiB),
             level 0 PTE 20:12                                                     8-byte entries
    pae      level 2 PDPTE 31:30, held in four registers since the last load of them;
             level 1 PDE 29:21 (2 MiB), level 0 PTE 20:12                          8-byte entries
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

PRESENT = 0x001
WRITABLE = 0x002
USER = 0x004
ACCESSED = 0x020
DIRTY = 0x040
LARGE = 0x080
GLOBAL = 0x100
NO_EXECUTE = 0x8000_0000_0000_0000

READ, WRITE, FETCH = 0, 1, 2
KIND_NAMES = ("read", "write", "fetch", "access of unknown kind")

ERROR_PRESENT = 0x01
ERROR_WRITE = 0x02
ERROR_USER = 0x04
ERROR_RESERVED = 0x08
ERROR_FETCH = 0x10

# What an entry is to a walk that reads it.
ABSENT, RESERVED, TABLE, PAGE = 0, 1, 2, 3

_PHYSICAL_BITS = 40
_LONG_ADDRESS = ((1 << _PHYSICAL_BITS) - 1) & ~0xFFF
_LONG_TOO_HIGH = ((1 << 52) - 1) & ~((1 << _PHYSICAL_BITS) - 1)
_PAE_RESERVED = 0x7FF << 52
_REGISTER_RESERVED = 0x1E6


class Mode(NamedTuple):
    """The part of the control registers that decides how entries are read and kept."""

    paging: bool
    pse: bool
    pge: bool
    pae: bool
    nxe: bool
    smep: bool = False


def mode_of(cr0: int, cr4: int, efer: int) -> Mode:
    """Read the mode out of the registers' values."""
    return Mode(
        paging=bool(cr0 >> 31 & 1),
        pse=bool(cr4 >> 4 & 1),
        pge=bool(cr4 >> 7 & 1),
        pae=bool(cr4 >> 5 & 1),
        nxe=bool(efer >> 11 & 1),
        smep=bool(cr4 >> 20 & 1),
    )


def write_protect(cr0: int) -> bool:
    """Tell whether the supervisor, too, needs W in order to write (CR0.WP)."""
    return bool(cr0 >> 16 & 1)


class Level(NamedTuple):
    """How one level's entries are read in one mode.

    Attributes:
        shift: First address bit of the level's index; a page mapped here has `1 << shift` bytes.
        leaf: Whether every entry maps a page.
        large_bit: Bit that makes an entry map a page, 0 where none does.
        table_reserved: Bits that fault in an entry pointing to a table.
        page_reserved: Bits that fault in an entry mapping a page.
        page_mask: Bits of such an entry that are the page's address.
        high_address: Whether bits 20:13 of a large entry are address bits 39:32 (PSE-36).
        implied: Bits an entry counts as having: rights and A, where the level has none of its own.
    """

    name: str
    shift: int
    index_mask: int
    leaf: bool
    large_bit: int
    table_reserved: int
    page_reserved: int
    page_mask: int
    high_address: bool
    implied: int = 0

    def classify(self, value: int) -> int:
        """Return ABSENT, RESERVED, TABLE or PAGE."""
        if not value & PRESENT:
            return ABSENT
        if self.leaf or value & self.large_bit:
            return RESERVED if value & self.page_reserved else PAGE
        return RESERVED if value & self.table_reserved else TABLE

    def page_gfn(self, value: int, gva: int) -> int:
        """Return the guest frame that holds `gva` in the page mapped by `value`."""
        frame = (value & self.page_mask) >> 12
        if self.high_address:
            frame |= (value >> 13 & 0xFF) << 20
        return frame | (gva & ((1 << self.shift) - 1)) >> 12


class Format(NamedTuple):
    """A paging format.

    Attributes:
        levels: Names and first address bits, from the leaf up.
        large_levels: Levels, other than the leaf's, whose entries may map pages.
        table_mask: Bits of an entry, or of CR3, that are a table's address.
        registers: Number of entries of the top level, if a CPU holds them in registers; else 0.
    """

    name: str
    entry_bytes: int
    address_bits: int
    index_bits: int
    levels: tuple[tuple[str, int], ...]
    large_levels: tuple[int, ...]
    table_mask: int
    sign_extended: bool
    registers: int = 0

    @property
    def top(self) -> int:
        """Number of the root's level."""
        return len(self.levels) - 1

    @property
    def per_table(self) -> int:
        """Number of entries in a table."""
        return 1 << self.index_bits

    def linear(self, gva: int) -> int | None:
        """Return `gva` cut to the translated bits, or None if no walk may start from it."""
        if not self.sign_extended:
            return gva if gva >> self.address_bits == 0 else None
        upper = gva >> (self.address_bits - 1)
        if upper not in (0, (1 << (65 - self.address_bits)) - 1):
            return None
        return gva & ((1 << self.address_bits) - 1)

    def address(self, page: int) -> int:
        """Return the address of a page; recorded numbers of the upper half may come signed."""
        return (page << 12) & ((1 << (64 if self.sign_extended else 32)) - 1)

    def table_gfn(self, value: int) -> int:
        """Return the guest frame of the table that an entry, or CR3, points to."""
        return (value & self.table_mask) >> 12


IA32 = Format("ia32", 4, 32, 10, (("PTE", 12), ("PDE", 22)), (1,), 0xFFFF_F000, sign_extended=False)
X86_64 = Format(
    "x86-64",
    8,
    48,
    9,
    (("PTE", 12), ("PDE", 21), ("PDPTE", 30), ("PML4E", 39)),
    (1, 2),
    _LONG_ADDRESS,
    sign_extended=True,
)
PAE = Format(
    "pae",
    8,
    32,
    9,
    (("PTE", 12), ("PDE", 21), ("PDPTE", 30)),
    (1,),
    _LONG_ADDRESS,
    sign_extended=False,
    registers=4,
)
FORMATS = {form.name: form for form in (IA32, X86_64, PAE)}

# What else loads the registers, beside a change of mode: CR0.NW, CR0.CD; CR4.SMEP.
_LOADING = {"CR0": 3 << 29, "CR4": 1 << 20}


def loads_registers(form: Format, what: str, changed: int) -> bool:
    """Tell whether a change of these bits of CR0 or CR4 loads the top level's registers anew."""
    return form.registers > 0 and bool(changed & _LOADING[what])


@lru_cache(maxsize=64)
def levels_in(form: Format, mode: Mode) -> tuple[Level, ...]:
    """Return how each level of `form` is read in `mode`, from the leaf up."""
    return tuple(
        _short_level(form, mode, number)
        if form.entry_bytes == 4
        else _long_level(form, mode, number)
        for number in range(len(form.levels))
    )


def _short_level(form: Format, mode: Mode, number: int) -> Level:
    name, shift = form.levels[number]
    large = number == 1
    return Level(
        name=name,
        shift=shift,
        index_mask=form.per_table - 1,
        leaf=not large,
        large_bit=LARGE if large and mode.pse else 0,
        table_reserved=0,
        page_reserved=1 << 21 if large else 0,
        page_mask=0xFFFF_FFFF & ~((1 << shift) - 1),
        high_address=large,
    )


def _long_level(form: Format, mode: Mode, number: int) -> Level:
    name, shift = form.levels[number]
    large = number in form.large_levels
    in_register = form.registers > 0 and number == form.top
    reserved = _LONG_TOO_HIGH | (0 if mode.nxe else NO_EXECUTE)
    if not form.sign_extended:
        reserved |= _PAE_RESERVED
    if in_register:
        reserved |= NO_EXECUTE | _REGISTER_RESERVED
    # Of a large page's address field only bit 12 (PAT) is not address.
    inside = ((1 << shift) - 1) & ~0x1FFF if large else 0
    return Level(
        name=name,
        shift=shift,
        index_mask=(form.registers if in_register else form.per_table) - 1,
        leaf=number == 0,
        large_bit=LARGE if large else 0,
        table_reserved=reserved | (LARGE if number == form.top else 0),
        page_reserved=reserved | inside,
        page_mask=_LONG_ADDRESS & ~((1 << shift) - 1),
        high_address=False,
        implied=WRITABLE | USER | ACCESSED if in_register else 0,
    )


def permits(
    every: int, any_of: int, kind: int, user: bool, write_protected: bool, smep: bool
) -> bool:
    """Tell whether an access passes the rights of a walk.

    Args:
        every: AND of the entries used (W and U count only if all have them).
        any_of: OR of the entries used (one NX is enough).
        write_protected: CR0.WP at the time of the access.
        smep: CR4.SMEP: what a user may use a supervisor must not execute.
    """
    if user and not every & USER:
        return False
    if kind == WRITE:
        return bool(every & WRITABLE) or not (user or write_protected)
    if kind == FETCH and smep and not user and every & USER:
        return False
    return kind == READ or (kind == FETCH and not any_of & NO_EXECUTE)


def rights_text(every: int, any_of: int) -> str:
    """Return the rights of a walk as `wux` with a dash for each one missing."""
    held = (every & WRITABLE, every & USER, not any_of & NO_EXECUTE)
    return "".join(letter if has else "-" for letter, has in zip("wux", held, strict=True))


def error_of(kind: int, user: bool, tells_fetches: bool) -> int:
    """Return the error code of an access's fault, without the bits that tell its cause.

    Args:
        tells_fetches: EFER.NXE or CR4.SMEP is set.
    """
    return (
        (ERROR_WRITE if kind == WRITE else 0)
        | (ERROR_USER if user else 0)
        | (ERROR_FETCH if kind == FETCH and tells_fetches else 0)
    )


def kind_of(error: int) -> int:
    """Return the kind of access an error code tells; a fetch may look like a read."""
    if error & ERROR_FETCH:
        return FETCH
    return WRITE if error & ERROR_WRITE else READ
