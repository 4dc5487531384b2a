"""Recorded IA-32 accesses, one by one: each made here again and compared bit for bit.

A case is one access with the entries it walks, before and after. Its tables are guest tables and
its physical addresses guest-physical, so bare hardware and every scheme must pass the same file.
Each case starts with empty TLBs and shadows, and what it changed is put back; at the end all of
memory must be as it was before the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penumbra.actors.lab.files import Array, FileRefusedError, read_arrays
from penumbra.actors.lab.one_cpu import Access, Fetch, one_cpu
from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw import operations as o
from penumbra.hw.exits import Done, Exit, PageFault
from penumbra.hw.formats import CR0_PG, IA32, PAGE_BYTES, PAGE_SHIFT, A, D, P

FIRST_TABLE, LAST_TABLE = 0x40_0000, 0x80_0000
FIRST_DATA, END_OF_RAM = 0x100_0000, 0x800_0000
READ, WRITE, FETCH, XOR, XCHG, LOCK_XOR = range(6)
CROSSES, HAS_PTE_A, HAS_PTE_B = 1, 2, 4
ENTRIES = ("pde_a", "pte_a", "pde_b", "pte_b")
_HASH = 0x9E3779B1
_PAGE = PAGE_BYTES - 1


class Case(NamedTuple):
    """One row of the file, its columns by name."""

    cr0: int
    cr3: int
    cr4: int
    cpl: int
    linear: int
    kind: int
    size: int
    operand: int
    flags: int
    pde_a: int
    pte_a: int
    pde_b: int
    pte_b: int
    fault: int
    error: int
    cr2: int
    phys_a: int
    phys_b: int
    value: int
    pde_a_after: int
    pte_a_after: int
    pde_b_after: int
    pte_b_after: int

    def entries(self) -> dict[str, int]:
        """Return where the entries that are in memory lie, by column name."""
        root = self.cr3 & ~_PAGE
        at = {"pde_a": root + 4 * (self.linear >> 22)}
        if self.flags & HAS_PTE_A:
            at["pte_a"] = (self.pde_a & ~_PAGE) + 4 * (self.linear >> 12 & 1023)
        if self.flags & CROSSES:
            last = self.linear + self.size - 1 & 0xFFFF_FFFF
            at["pde_b"] = root + 4 * (last >> 22)
            if self.flags & HAS_PTE_B:
                at["pte_b"] = (self.pde_b & ~_PAGE) + 4 * (last >> 12 & 1023)
        return at

    def access(self) -> Access:
        """Return the access as something a CPU executes."""
        match self.kind:
            case 0:
                return o.Load(self.linear, self.size)
            case 1:
                return o.Store(self.linear, self.size, self.operand & self.ones)
            case 2:
                return Fetch(self.linear, self.size)
            case 4:
                return o.Exchange(self.linear, self.size, self.operand & self.ones)
            case _:
                return o.XorMemory(self.linear, self.size, self.operand & self.ones)

    @property
    def ones(self) -> int:
        return (1 << 8 * self.size) - 1


class Failure(NamedTuple):
    """A case that differs: its row and, per difference, a line."""

    case: int
    differences: tuple[str, ...]


@dataclass
class Report:
    """What became of a file's cases under one scheme.

    Attributes:
        stray: Guest-physical addresses of dwords that no case should have changed, at most 20.
    """

    scheme: str
    n_cases: int
    failures: list[Failure] = field(default_factory=list)
    stray: list[int] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures and not self.stray


def pattern(first: int, last: int) -> npt.NDArray[np.uint32]:
    """Return what the dwords with numbers `first` up to `last` hold before a case."""
    return np.arange(first, last, dtype=np.uint32) * np.uint32(_HASH)


def read_cases(path: Path) -> list[Case]:
    """Read a file of cases.

    Raises:
        FileRefusedError: It is damaged, or a case is none.
    """
    columns = read_arrays(path, lambda name: name in Case._fields)
    missing = [name for name in Case._fields if name not in columns]
    if missing:
        raise FileRefusedError("arrays", f"{', '.join(missing)} missing")
    _refuse_bad_columns(columns)
    rows = zip(*(columns[name].tolist() for name in Case._fields), strict=True)
    cases = [Case(*row) for row in rows]
    for number, case in enumerate(cases):
        cause = _contradiction(case)
        if cause:
            raise FileRefusedError(f"case {number}", cause)
    return cases


def _refuse_bad_columns(columns: Mapping[str, Array]) -> None:
    n = columns["linear"].shape
    if len(n) != 1 or not n[0]:
        raise FileRefusedError("linear", f"has shape {n}: not one row per case")
    most = {"kind": 5, "cpl": 3, "size": 15, "flags": 15, "fault": 1}
    for name, column in columns.items():
        if column.shape != n:
            raise FileRefusedError(name, f"has shape {column.shape}, `linear` has {n}")
        limit = most.get(name, (1 << 52) - 1 if name.startswith("phys") else 0xFFFF_FFFF)
        bad = np.flatnonzero((column < 0) | (column > limit))
        if len(bad):
            value = int(column[bad[0]])
            raise FileRefusedError(f"case {bad[0]}", f"{name} is {value}: not 0 .. {limit}")


def _contradiction(case: Case) -> str | None:
    """Say why a row cannot be a case, or None."""
    if not case.cr0 & CR0_PG:
        return f"cr0 is {case.cr0:#x}: paging is off"
    if not case.size or (case.kind != FETCH and case.size not in (1, 2, 4)):
        return f"an access of kind {case.kind} has {case.size} bytes"
    crosses = (case.linear & _PAGE) + case.size > PAGE_BYTES
    if crosses != bool(case.flags & CROSSES):
        return f"flags are {case.flags:#x}, but {case.size} bytes at {case.linear:#x} say otherwise"
    words: dict[int, int] = {}
    for name, at in case.entries().items():
        value: int = getattr(case, name)
        if not FIRST_TABLE <= at < LAST_TABLE:
            return f"{name} lies at {at:#x}: tables are in {FIRST_TABLE:#x} .. {LAST_TABLE - 1:#x}"
        if words.setdefault(at, value) != value:
            return f"{name} is {value:#x} and {words[at]:#x} at one address"
    return None


class MmuCases:
    """128 MiB of guest memory that hold the known pattern, and what accesses them."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme.name
        self._cpu = cpu = one_cpu(IA32, scheme, END_OF_RAM >> PAGE_SHIFT)
        self.ram, self.frame_map = cpu.ram, cpu.frame_map
        self._dwords = cpu.ram.array32.reshape(-1, PAGE_BYTES // 4)
        self._map = cpu.frame_map.tolist()
        for rows, wanted in self._data():
            self._dwords[rows] = wanted

    def _data(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]]:
        """Yield machine frames and what they hold, in pieces that a cache holds."""
        step = 1 << 20
        for first in range(FIRST_DATA, END_OF_RAM, step):
            rows = self._cpu.frame_map[first >> PAGE_SHIFT : first + step >> PAGE_SHIFT]
            yield rows, pattern(first >> 2, first + step >> 2).reshape(-1, PAGE_BYTES // 4)

    def run(self, cases: Sequence[Case]) -> Report:
        """Run every case; failures come back in order."""
        report = Report(self.scheme, len(cases))
        for number, case in enumerate(cases):
            differences = self.case(case)
            if differences:
                report.failures.append(Failure(number, tuple(differences)))
        report.stray = self._stray()
        return report

    def case(self, case: Case) -> list[str]:
        """Run one case and say what differs; memory is afterwards as before."""
        cpu, places = self._cpu, case.entries()
        for name, at in places.items():
            self._store(at, 4, getattr(case, name))
        cpu.start(case.cr0, case.cr3, case.cr4)
        stop = cpu.access(case.access(), case.cpl == 3)
        after = {name: self._load(at, 4) for name, at in places.items()}
        for at in places.values():
            self._store(at, 4, 0)
        used = cpu.used if isinstance(stop, Done) else []
        left = self._take_back(case, used)
        if isinstance(stop, PageFault) and case.fault:
            return _compare_fault(case, stop, after)
        if isinstance(stop, Done) and not case.fault:
            return _compare_done(case, stop, after, used, left)
        wanted = f"a page fault with error {case.error:#x}" if case.fault else "no fault"
        return [f"{_text(stop)}, expected {wanted}"]

    # ---- guest-physical memory ------------------------------------------------------------------

    def _hpa(self, gpa: int) -> int:
        gfn = gpa >> PAGE_SHIFT
        if gfn >= len(self._map):
            return self._cpu.ram.n_frames << PAGE_SHIFT
        return int(self._map[gfn]) << PAGE_SHIFT | gpa & _PAGE

    def _load(self, gpa: int, size: int) -> int:
        return self._cpu.ram.load(self._hpa(gpa), size)

    def _store(self, gpa: int, size: int, value: int) -> None:
        self._cpu.ram.store(self._hpa(gpa), size, value)

    def _take_back(self, case: Case, used: Sequence[int]) -> int:
        """Return what now stands where the access went, and restore the pattern there."""
        value = shift = 0
        for at, n in _parts(case, used):
            value |= self._load(at, n) << shift
            shift += 8 * n
            for byte in range(at, at + n):
                self._store(byte, 1, _pattern_byte(byte))
        return value

    def _stray(self) -> list[int]:
        """Return where memory is not as it was at the start."""
        found: list[int] = []
        low = self._map[: FIRST_DATA >> PAGE_SHIFT]
        zero = np.zeros((1, PAGE_BYTES // 4), np.uint32)
        pieces = [(np.array(low, np.int64), zero), *self._data()]
        gpa = 0
        for rows, wanted in pieces:
            if not np.array_equal(self._dwords[rows], np.broadcast_to(wanted, (len(rows), 1024))):
                differs = np.flatnonzero(self._dwords[rows] != wanted)
                found += (gpa + 4 * differs).tolist()
            gpa += len(rows) << PAGE_SHIFT
        return found[:20]


def check_mmu(path: Path, scheme: Scheme) -> Report:
    """Read a file of cases and run them under a scheme.

    Raises:
        FileRefusedError: The file is damaged, or a case is none.
    """
    return MmuCases(scheme).run(read_cases(path))


def _parts(case: Case, used: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (guest-physical address, bytes) of an access, page by page."""
    if not used:
        return []
    in_a = min(case.size, PAGE_BYTES - (case.linear & _PAGE))
    return list(zip(used, (in_a, case.size - in_a), strict=False))


def _pattern_byte(gpa: int) -> int:
    if not FIRST_DATA <= gpa < END_OF_RAM:
        return 0
    return ((gpa >> 2) * _HASH >> 8 * (gpa & 3)) & 0xFF


def _before(parts: Sequence[tuple[int, int]]) -> int:
    """Return what the pattern holds in parts of memory; all ones beyond RAM."""
    value = shift = 0
    for at, n in parts:
        for byte in range(at, at + n):
            value |= (_pattern_byte(byte) if byte < END_OF_RAM else 0xFF) << shift
            shift += 8
    return value


def _stored(case: Case, before: int, parts: Sequence[tuple[int, int]]) -> int:
    """Return what memory must hold after an access that went to `parts`."""
    if case.kind in (READ, FETCH):
        return before
    made = (case.operand if case.kind in (WRITE, XCHG) else before ^ case.operand) & case.ones
    shift = 0
    for at, n in parts:
        part = (1 << 8 * n) - 1 << shift
        if at >= END_OF_RAM:  # the store vanished
            made = made & ~part | before & part
        shift += 8 * n
    return made


def _compare_done(
    case: Case, stop: Done, after: Mapping[str, int], used: Sequence[int], left: int
) -> list[str]:
    """Compare an access that must complete and did: everything is exact."""
    phys_a, phys_b = used if len(used) == 2 else (*used, 0)
    found = {"phys_a": phys_a, "phys_b": phys_b, "value": case.operand}
    if case.kind == FETCH:
        found["value"] = found["phys_a"] & 0xFFFF_FFFF
        wanted_value = case.value & 0xFFFF_FFFF
    else:
        wanted_value = case.value
        if case.kind == READ:
            found["value"] = stop.value
        elif case.kind == XCHG:  # the rest of EAX stays
            found["value"] = case.operand & ~case.ones & 0xFFFF_FFFF | stop.value
    wanted = {"phys_a": case.phys_a, "phys_b": case.phys_b, "value": wanted_value}
    for name in ENTRIES:
        found[name] = after.get(name, 0)
        wanted[name] = getattr(case, f"{name}_after")
    parts = _parts(case, used)
    found["memory"], wanted["memory"] = left, _stored(case, _before(parts), parts)
    return [
        f"{name} is {found[name]:#x}, expected {wanted[name]:#x}"
        for name in wanted
        if found[name] != wanted[name]
    ]


def _compare_fault(case: Case, stop: PageFault, after: Mapping[str, int]) -> list[str]:
    """Compare an access that must fault and did.

    A of entries read before the fault may be set or not, and so may A and D of the first page of a
    crossing access; nothing else may have changed.
    """
    differences = []
    if stop.error != case.error:
        differences.append(f"error code is {stop.error:#x}, expected {case.error:#x}")
    if stop.gva != case.cr2:
        differences.append(f"CR2 is {stop.gva:#x}, expected {case.cr2:#x}")
    places = case.entries()
    may: dict[int, int] = {}
    for name, at in places.items():
        if getattr(case, name) & P:
            may[at] = may.get(at, 0) | A
    if case.flags & CROSSES:
        leaf = places.get("pte_a", places["pde_a"])
        may[leaf] = may.get(leaf, 0) | D
    for name, at in places.items():
        before: int = getattr(case, name)
        if after[name] & ~may.get(at, 0) != before & ~may.get(at, 0) or before & ~after[name]:
            differences.append(f"{name} is {after[name]:#x} after the fault, was {before:#x}")
    return differences


def _text(stop: Exit) -> str:
    if isinstance(stop, PageFault):
        return f"a page fault with error {stop.error:#x} at {stop.gva:#x}"
    return "no fault" if isinstance(stop, Done) else str(stop)


def describe(case: Case) -> str:
    """Say in a few words what a case does."""
    kinds = ("read", "write", "fetch", "xor [mem]", "xchg [mem]", "lock xor [mem]")
    return f"{kinds[case.kind]} of {case.size} at {case.linear:#x}, CPL {case.cpl}"
