"""A small machine for the hardware's tests: RAM, tables built by hand, a CPU on either engine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from penumbra.hw import mmu_layout as m
from penumbra.hw.compiled import kernels_for
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import PageFault
from penumbra.hw.formats import IA32, FormatSpec
from penumbra.hw.memory import Ram
from penumbra.hw.streams import AccessStream
from penumbra.hw.tlb import Tlb, TlbGeometry

ENGINES = ("plain", "numba") if find_spec("numba") else ("plain",)
READ, WRITE, FETCH = 0, 1, 2
P, W, U, A, D, PS, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
ALL = P | W | U
PAGE = 4096
SMALL = TlbGeometry(entries=16, ways=4, psc_slots=4)


class Rig:
    """RAM with tables from frame 1 up (the root is frame 1), a TLB and a CPU with all modes on."""

    def __init__(
        self,
        spec: FormatSpec = IA32,
        engine: str = "plain",
        *,
        n_frames: int = 64,
        geometry: TlbGeometry = SMALL,
        streams: Sequence[AccessStream] = (),
    ) -> None:
        self.spec = spec
        self.ram = Ram(n_frames)
        self.tlb = Tlb(spec, geometry)
        self.streams = streams
        self._kernels = kernels_for(spec, engine)
        self._n_tables = 0
        self.root = self.new_table()
        self.cpu = self.new_cpu(0)
        self.flagged: list[tuple[int, int, int, int]] = []
        self.cpu.on_flagged = lambda *store: self.flagged.append(store)

    def new_cpu(self, cpu_id: int, tlb: Tlb | None = None) -> PhysicalCpu:
        """Return a CPU on this RAM, on the rig's TLB unless another is given."""
        cpu = PhysicalCpu(cpu_id, self.spec, self.ram, tlb or self.tlb, self.streams, self._kernels)
        cpu.set_modes(wp=True, pse=True, pge=True, nxe=True)
        cpu.load_root(self.root * PAGE)
        cpu.reg[m.R_LIMIT] = 1 << 60
        return cpu

    def new_table(self) -> int:
        """Return the frame of a fresh, empty table."""
        self._n_tables += 1
        self.ram.clear_frame(self._n_tables)
        return self._n_tables

    def word(self, at: int) -> int:
        """Return the entry at a physical address."""
        return self.ram.load(at, self.spec.entry_bytes)

    def set_word(self, at: int, value: int) -> None:
        """Store an entry as another CPU would: past this CPU's MMU."""
        self.ram.store(at, self.spec.entry_bytes, value)

    def entry(self, gva: int, level: int = 0, root: int | None = None) -> int:
        """Return where the entry of `gva` at `level` lies, making the tables above it."""
        table = (root or self.root) * PAGE
        for above in range(self.spec.top, level, -1):
            at = table + self.spec.levels[above].index(gva) * self.spec.entry_bytes
            if self.word(at) == 0:
                self.set_word(at, self.new_table() * PAGE | ALL)
            table = self.word(at) & 0xF_FFFF_F000
        return table + self.spec.levels[level].index(gva) * self.spec.entry_bytes

    def map(
        self, gva: int, pfn: int, flags: int = ALL, level: int = 0, root: int | None = None
    ) -> int:
        """Map one page and return where its entry lies."""
        at = self.entry(gva, level, root)
        self.set_word(at, pfn * PAGE | flags | (PS if level else 0))
        return at

    def reads(self, gva: int, user: bool = True) -> int | tuple[int, int]:
        """Return the frame a read of `gva` uses, or (CR2, error)."""
        return self.access(gva, READ, user)

    def writes(self, gva: int, user: bool = True) -> int | tuple[int, int]:
        """Return the frame a write to `gva` uses, or (CR2, error)."""
        return self.access(gva, WRITE, user)

    def access(
        self, gva: int, kind: int, user: bool = True, cpu: PhysicalCpu | None = None
    ) -> int | tuple[int, int]:
        """Return the frame an access uses, or (CR2, error); the TLB must stay well-formed."""
        cpu = cpu or self.cpu
        pfn = cpu.translate(gva, kind, user)
        self.tlb.check()
        if pfn >= 0:
            return pfn
        fault = cpu.fault(kind)
        assert isinstance(fault, PageFault)
        assert fault.kind == kind
        return (fault.gva, fault.error)

    def missed(self, gva: int) -> bool:
        """Read `gva` and tell whether the TLB had to walk for it."""
        before = self.cpu.reg[m.R_MISSES]
        self.reads(gva)
        return self.cpu.reg[m.R_MISSES] != before
