"""Paging formats as tables: what an entry's bits mean, level by level, and what may be cached.

A format is data. The generic walker reads it once, when its kernels are built; the guest kernel
and the VMM read it to build tables. Levels are numbered from the leaf up: level 0 holds the entries
that map 4 KiB pages.

    IA-32, two levels, 4-byte entries         x86-64, four levels, 8-byte entries
    level 1  PDE   bits 31:22                 level 3  PML4E  bits 47:39
    level 0  PTE   bits 21:12                 level 2  PDPTE  bits 38:30   (PS: 1 GiB)
                                              level 1  PDE    bits 29:21   (PS: 2 MiB)
    a PDE with PS maps 4 MiB                  level 0  PTE    bits 20:12

    PAE: levels 1 and 0 of x86-64 under four PDPTE registers, bits 31:30 of the address. MOV CR3
    loads them from the 32 bytes at CR3; a walk reads them and not memory. They carry no rights and
    no A; what is reserved in a present one is #GP at the load.

    Sv39: levels 2, 1 and 0 as bits 38:30, 29:21 and 20:12; any level may hold a leaf.

    31/51 .. 12   11 9   8   7    6   5    4    3    2    1    0
    frame       | free | G | PS | D | A | PCD| PWT| U/S| R/W| P        63: NX (x86-64)
    53 .. 10 PPN, 9 8 free | D | A  | G | U  | X  | W  | R  | V        Sv39
"""

from __future__ import annotations

from dataclasses import dataclass, replace

P = 1 << 0
W = 1 << 1
U = 1 << 2
PWT = 1 << 3
PCD = 1 << 4
A = 1 << 5
D = 1 << 6
PS = 1 << 7
G = 1 << 8
NX = 1 << 63

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT

CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR0_PE = 1 << 0
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_PGE = 1 << 7
CR4_SMEP = 1 << 20
EFER_NXE = 1 << 11

# Page-fault error code bits (SDM vol. 3, 4.7).
PF_P = 1 << 0
PF_W = 1 << 1
PF_U = 1 << 2
PF_RSVD = 1 << 3
PF_I = 1 << 4


@dataclass(frozen=True)
class Level:
    """One level of a format.

    Attributes:
        name: The field's name for an entry of this level (`PTE`, `PDE`, ...).
        shift: First address bit that indexes this level's table.
        index_bits: Number of address bits that index it.
        large: Whether PS makes an entry of this level map a page of `1 << shift` bytes.
        reserved: Bits that must be 0 in an entry that points to a table (or, at level 0, a page).
        reserved_large: Bits that must be 0 in an entry that maps a large page.
    """

    name: str
    shift: int
    index_bits: int
    large: bool
    reserved: int
    reserved_large: int

    @property
    def n_entries(self) -> int:
        return 1 << self.index_bits

    def index(self, gva: int) -> int:
        """Return the index of the entry that translates `gva` at this level."""
        return (gva >> self.shift) & (self.n_entries - 1)


@dataclass(frozen=True)
class FormatSpec:
    """A paging format: its levels from the leaf up, its masks and its caching rules.

    Attributes:
        entry_bytes: 4 or 8.
        va_bits: Width of a virtual address; addresses are canonical if `sign_extended`.
        frame_mask: Bits of a non-large entry that hold the frame's address.
        has_nx: Whether bit 63 is NX when EFER.NXE is set (reserved otherwise).
        large_needs_pse: Whether PS counts only with CR4.PSE set.
        pse36: Whether bits 20:13 of a large PDE hold physical address bits 39:32.
        rwx: Whether entries have RISC-V's bits: a leaf is what has R or X, rights are the leaf's
            alone, and a fault's code is the exception's cause.
        a, d: Masks of the accessed and the dirty bit.
        frame_shift: Bit of an entry at which the frame's number starts.
        may_cache_not_present: Whether hardware may cache entries with P=0 (x86: never).
        root_load_flushes: Whether loading the root drops translations that are not global.
        page_flush_drops_upper: Whether invalidating one page drops all upper-level entries too.
        root_registers: Number of top-level entries held in registers, 0 if a walk reads them all.
        root_mask: Bits of CR3 that are the address of the root.
    """

    name: str
    levels: tuple[Level, ...]
    entry_bytes: int
    va_bits: int
    sign_extended: bool
    frame_mask: int
    has_nx: bool
    large_needs_pse: bool
    pse36: bool
    rwx: bool = False
    a: int = A
    d: int = D
    frame_shift: int = PAGE_SHIFT
    may_cache_not_present: bool = False
    root_load_flushes: bool = True
    page_flush_drops_upper: bool = True
    root_registers: int = 0
    root_mask: int = ((1 << 52) - 1) & ~0xFFF

    @property
    def top(self) -> int:
        """Number of the root's level."""
        return len(self.levels) - 1

    def bad_root_entry(self, entry: int) -> bool:
        """Tell whether loading the top-level entry into its register is #GP (SDM vol. 3, 4.4.1)."""
        return bool(entry & P and entry & (self.levels[self.top].reserved | NX))

    def canonical(self, gva: int) -> bool:
        """Tell whether `gva` is an address this format translates at all."""
        if not self.sign_extended:
            return gva >> self.va_bits == 0
        return (gva >> (self.va_bits - 1)) in (0, (1 << (65 - self.va_bits)) - 1)


MAXPHYADDR = 40
_ABOVE_PHYS = ((1 << 52) - 1) & ~((1 << MAXPHYADDR) - 1)

IA32 = FormatSpec(
    name="ia32",
    levels=(
        Level("PTE", 12, 10, large=False, reserved=0, reserved_large=0),
        Level("PDE", 22, 10, large=True, reserved=0, reserved_large=1 << 21),
    ),
    entry_bytes=4,
    va_bits=32,
    sign_extended=False,
    frame_mask=0xFFFF_F000,
    root_mask=0xFFFF_F000,
    has_nx=False,
    large_needs_pse=True,
    pse36=True,
)

_PTE = Level("PTE", 12, 9, large=False, reserved=_ABOVE_PHYS, reserved_large=0)
_PDE = Level("PDE", 21, 9, large=True, reserved=_ABOVE_PHYS, reserved_large=_ABOVE_PHYS | 0x1FE000)

X86_64 = FormatSpec(
    name="x86-64",
    levels=(
        _PTE,
        _PDE,
        Level(
            "PDPTE",
            30,
            9,
            large=True,
            reserved=_ABOVE_PHYS,
            reserved_large=_ABOVE_PHYS | 0x3FFFE000,
        ),
        Level("PML4E", 39, 9, large=False, reserved=_ABOVE_PHYS | PS, reserved_large=0),
    ),
    entry_bytes=8,
    va_bits=48,
    sign_extended=True,
    frame_mask=((1 << 52) - 1) & ~0xFFF,
    has_nx=True,
    large_needs_pse=False,
    pse36=False,
)

# Bits 62:52 of a PAE entry are reserved, free in x86-64 (SDM vol. 3, tables 4-9 to 4-11).
_ABOVE_PAE = 0x7FF << 52

PAE = FormatSpec(
    name="pae",
    levels=(
        replace(_PTE, reserved=_PTE.reserved | _ABOVE_PAE),
        replace(
            _PDE,
            reserved=_PDE.reserved | _ABOVE_PAE,
            reserved_large=_PDE.reserved_large | _ABOVE_PAE,
        ),
        # Bit 63 as well, see `bad_root_entry`: the masks of all levels stay below the sign.
        Level(
            "PDPTE", 30, 2, large=False, reserved=_ABOVE_PHYS | _ABOVE_PAE | 0x1E6, reserved_large=0
        ),
    ),
    entry_bytes=8,
    va_bits=32,
    sign_extended=False,
    frame_mask=((1 << 52) - 1) & ~0xFFF,
    has_nx=True,
    large_needs_pse=False,
    pse36=False,
    root_registers=4,
    root_mask=0xFFFF_FFE0,
)

# RISC-V's bits: V and U as P and U elsewhere.
R, W_RISCV, X, U_RISCV, G_RISCV, A_RISCV, D_RISCV = (1 << bit for bit in range(1, 8))
_ABOVE_PPN = 0x1FF << 54  # and bit 63, which is the sign
_POINTER = _ABOVE_PPN | U_RISCV | A_RISCV | D_RISCV

# RISC-V privileged specification 1.12, 4.3 and 4.4. No Svpbmt, no Svnapot: bits 63:54 are reserved.
SV39 = FormatSpec(
    name="sv39",
    levels=tuple(
        Level(name, shift, 9, large=shift > 12, reserved=_POINTER, reserved_large=_ABOVE_PPN)
        for name, shift in (("PTE0", 12), ("PTE1", 21), ("PTE2", 30))
    ),
    entry_bytes=8,
    va_bits=39,
    sign_extended=True,
    frame_mask=((1 << 44) - 1) << 10,
    has_nx=False,
    large_needs_pse=False,
    pse36=False,
    rwx=True,
    a=A_RISCV,
    d=D_RISCV,
    frame_shift=10,
    may_cache_not_present=True,
    root_load_flushes=False,
    page_flush_drops_upper=False,
    root_mask=((1 << 56) - 1) & ~0xFFF,
)

FORMATS = {spec.name: spec for spec in (IA32, X86_64, PAE, SV39)}
