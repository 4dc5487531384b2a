"""The ports of a TLB that software manages: probe, write, invalidate, and the walk behind a miss.

Such a TLB is filled by whoever owns the tables it caches: an operating system's S-MMU, or a monitor
that keeps shadow tables. The CPU only says that it has no answer (`exits.TlbMiss`).

Source: A40 [0013], [0018]; VTLB, "software-managed".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penumbra.hw import mmu_layout as k
from penumbra.hw.exits import PageFault
from penumbra.hw.formats import PAGE_SHIFT, FormatSpec, G
from penumbra.hw.memory import Ram
from penumbra.hw.streams import READ, WRITE
from penumbra.hw.tlb import Tlb

_MASK64 = (1 << 64) - 1
_RIGHTS = k.E_R | k.E_W | k.E_U | k.E_X
_ALL_RIGHTS = k.E_W | k.E_U | k.E_X


@dataclass(frozen=True)
class TlbEntry:
    """One translation as software writes it and reads it back.

    Attributes:
        pfn: First 4 KiB frame of the page.
        rights: `E_W`, `E_U`, `E_X` (RISC-V: `E_R` too) of `mmu_layout`, the AND of all levels.
        dirty: Whether writes may use it; the first write through a clean one traps.
        is_global: Whether every address space of this CPU uses it; on x86 only under CR4.PGE.
        level: 0 for a 4 KiB page, else the level of the large page it maps.
        marked: Whether stores through it are logged in the guest write buffer.
    """

    pfn: int
    rights: int
    dirty: bool = False
    is_global: bool = False
    level: int = 0
    marked: bool = False


class TlbPorts:
    """What software may do with the TLB of one CPU.

    Invariant: no page has two entries in one address space, whatever their sizes.
    """

    def __init__(
        self,
        spec: FormatSpec,
        ram: Ram,
        tlb: Tlb,
        reg: memoryview[int],
        functions: Any,
        arrays: tuple[Any, ...],
    ) -> None:
        """Take the parts of a CPU; `PhysicalCpu.let_software_manage` calls this.

        Args:
            functions: The kernels of the CPU's format.
            arrays: What they are called with: RAM twice, the registers, the TLB.
        """
        self._spec = spec
        self._ram = ram
        self._tlb = tlb
        self._reg = reg
        self._functions = functions
        self._arrays = arrays
        self._page_mask = (1 << (spec.va_bits - PAGE_SHIFT)) - 1

    @property
    def asid(self) -> int:
        """The tag of the entries of the address space that runs now."""
        return self._reg[k.R_TAG] >> k.TAG_SHIFT

    def probe(self, gva: int, asid: int | None = None) -> TlbEntry | None:
        """Return the entry an access would use, or None; its place in its set stays."""
        n, ways = self._tlb.geometry.entries, self._tlb.geometry.ways
        view = self._tlb.view
        for level in range(len(self._spec.levels)):
            part = self._part(gva, level)
            first = k.TLB_TAGS + (part & view[k.TLB_SET_MASK]) * ways
            for tag in self._tags(asid):
                key = part | tag | (level << k.LEVEL_SHIFT)
                for at in range(first, first + ways):
                    if view[at] == key:
                        return _entry(view[at + n], level)
        return None

    def write(self, gva: int, entry: TlbEntry, asid: int | None = None) -> None:
        """Put an entry for the page of `gva` in the place of the one there, or of an old one.

        Args:
            asid: The address space it belongs to; the one that runs now if None.
        """
        reg = self._reg
        _, _, regs, tlb = self._arrays
        running = reg[k.R_TAG]
        if asid is not None:
            reg[k.R_TAG] = asid << k.TAG_SHIFT
        self._functions.drop_page(regs, tlb, self._part(gva, 0))
        value = entry.pfn << PAGE_SHIFT | entry.rights & _RIGHTS | k.E_P
        if entry.dirty:
            value |= k.E_D
        if entry.marked:
            value |= k.E_MARKED
        tag = reg[k.R_TAG]
        if entry.is_global and (self._spec.rwx or reg[k.R_PGE]):
            value |= k.E_G
            tag = reg[k.R_GTAG]
        key = self._part(gva, entry.level) | tag | (entry.level << k.LEVEL_SHIFT)
        self._functions.insert(tlb, key, value)
        reg[k.R_TAG] = running

    def invalidate(self, gva: int) -> None:
        """Drop this CPU's entries of the page of `gva`, global and large ones too."""
        _, _, regs, tlb = self._arrays
        self._functions.drop_page(regs, tlb, self._part(gva, 0))

    # ---- what a miss handler does ---------------------------------------------------------------

    def refill(self, gva: int, kind: int, user: bool) -> PageFault | None:
        """Answer a miss out of the tables at the CPU's root, or return the fault they make.

        A is set in every entry read, and D in the leaf at a write, before the entry is written;
        without D it is written clean, so that the first write traps. A fault drops the page.
        """
        if not self._walk(gva, kind, user):
            self.invalidate(gva)
            return PageFault(gva, self._reg[k.R_FAULT_ERROR], 0, kind)
        self._set_bits(kind)
        self.write(gva, self._found(gva))
        return None

    def renew(self, gva: int) -> bool:
        """Bring a cached entry in line with the tables, whose bits stay; tell whether one is left.

        Where the TLB has none nothing is written.

        Source: A40 Fig. 12, step 876.
        """
        if self.probe(gva) is None:
            return False
        if not self._walk(gva, READ, False):
            self.invalidate(gva)
            return False
        self.write(gva, self._found(gva))
        return True

    def _walk(self, gva: int, kind: int, user: bool) -> bool:
        ram64, ram32, regs, tlb = self._arrays
        signed = gva - (1 << 64) if gva >> 63 else gva
        top, root = self._spec.top, self._reg[k.R_ROOT]
        return bool(
            self._functions.resolve(
                ram64, ram32, regs, tlb, signed, kind, int(user), top, root, _ALL_RIGHTS
            )
        )

    def _set_bits(self, kind: int) -> None:
        """Set A in what the last walk read and D in its leaf, in memory; the leaf comes last."""
        reg, spec = self._reg, self._spec
        leaf = reg[k.R_LEVEL]
        top = spec.top - 1 if spec.root_registers else spec.top
        for level in range(leaf if spec.rwx else top, leaf - 1, -1):
            entry = reg[k.R_ENTRY + level]
            want = entry | spec.a
            if level == leaf and kind == WRITE:
                want |= spec.d
            if want != entry:
                reg[k.R_AD_WRITES] += 1
                reg[k.R_ENTRY + level] = want
                self._ram.store(reg[k.R_PATH + level], spec.entry_bytes, want & _MASK64)

    def _found(self, gva: int) -> TlbEntry:
        """Return the translation the last walk found."""
        reg = self._reg
        level = reg[k.R_LEVEL]
        leaf, rights = reg[k.R_ENTRY + level], reg[k.R_RIGHTS]
        return TlbEntry(
            pfn=self._functions.leaf_frame(leaf, level),
            rights=rights,
            dirty=bool(leaf & self._spec.d),
            is_global=bool(rights & k.E_G if self._spec.rwx else leaf & G),
            level=level,
            marked=bool(leaf & reg[k.R_MARK]),
        )

    def _part(self, gva: int, level: int) -> int:
        """Return the number of the page of `gva`, of the size that `level` maps."""
        shift = self._spec.levels[level].shift - PAGE_SHIFT
        return (gva >> PAGE_SHIFT & self._page_mask) >> shift

    def _tags(self, asid: int | None) -> tuple[int, ...]:
        own = self._reg[k.R_TAG] if asid is None else asid << k.TAG_SHIFT
        uses_global = self._spec.rwx or self._reg[k.R_PGE]
        return (own, self._reg[k.R_GTAG]) if uses_global else (own,)


def _entry(value: int, level: int) -> TlbEntry:
    return TlbEntry(
        value >> PAGE_SHIFT, value & _RIGHTS, bool(value & k.E_D), bool(value & k.E_G), level,
        bool(value & k.E_MARKED),
    )  # fmt: skip
