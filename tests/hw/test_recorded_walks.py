"""The MMU against walks made elsewhere: single accesses case by case, and a kernel's own tables.

`tests/data/mmu_cases_sample.npz` holds one IA-32 access per row, before and after;
`tests/data/walk_sample_ia32.npz` the paging-structure pages of a running kernel with the complete
list of what they map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from penumbra.hw import mmu_layout as m
from penumbra.hw.compiled import kernels_for
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import Done, Exit, PageFault
from penumbra.hw.formats import IA32
from penumbra.hw.memory import Ram
from penumbra.hw.operations import CompareExchange, Exchange, Load, Store
from penumbra.hw.tlb import Tlb, TlbGeometry

from .rig import ENGINES, FETCH, PAGE, READ, SMALL, WRITE

DATA = Path(__file__).resolve().parent.parent / "data"
KNOWN_MEMORY, END_OF_RAM = 0x100_0000, 0x800_0000
XOR, XCHG, LOCK_XOR = 3, 4, 5
CROSSES, HAS_PTE_A, HAS_PTE_B = 1, 2, 4

RESULTS = ("fault", "error", "cr2", "phys_a", "phys_b", "value")
LEAF_COLUMNS = ("linear", "phys", "flags")
FLAG_OF_BIT = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 8: 7}
LARGE_LEAF, LARGE_BYTES = 1 << 6, 1 << 22


def pattern(first: int, last: int) -> npt.NDArray[np.uint32]:
    """Return the dwords the cases' memory holds from dword `first` up to `last`."""
    at = np.arange(first, last, dtype=np.uint64)
    return ((at * np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def rows(name: str) -> list[dict[str, int]]:
    with np.load(DATA / name) as file:
        columns = {key: file[key].tolist() for key in file.files}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class Bench:
    """One CPU and 128 MiB that hold the known pattern, put back after each case."""

    def __init__(self, engine: str) -> None:
        self.ram = Ram(END_OF_RAM // PAGE)
        self.ram.array32[KNOWN_MEMORY >> 2 :] = pattern(KNOWN_MEMORY >> 2, END_OF_RAM >> 2)
        self.cpu = PhysicalCpu(
            0, IA32, self.ram, Tlb(IA32, SMALL), kernels=kernels_for(IA32, engine)
        )
        self.used: list[int] = []
        self.cpu.on_used = self.note

    def note(self, gva: int, kind: int, user: bool, pfn: int) -> None:
        del kind, user
        self.used.append(pfn * PAGE | gva % PAGE)

    def read(self, at: int, size: int) -> int:
        return self.ram.load(at, size)

    def entries(self, case: dict[str, int]) -> dict[str, int]:
        """Return where the entries of a case lie, by column name; absent ones left out."""
        root = case["cr3"] & ~0xFFF
        last = case["linear"] + case["size"] - 1
        pages = {"a": (case["linear"], HAS_PTE_A)}
        if case["flags"] & CROSSES:
            pages["b"] = (last, HAS_PTE_B)
        found = {}
        for page, (linear, has_pte) in pages.items():
            found[f"pde_{page}"] = root + 4 * (linear >> 22)
            if case["flags"] & has_pte:
                table = case[f"pde_{page}"] & ~0xFFF
                found[f"pte_{page}"] = table + 4 * (linear >> 12 & 1023)
        return found

    def run(self, case: dict[str, int]) -> Exit:
        """Make the access; for XOR the guest's value is read by a compare that fails."""
        cpu, gva, size, eax = self.cpu, case["linear"], case["size"], case["operand"]
        user, kind = case["cpl"] == 3, case["kind"]
        if kind == READ:
            return cpu.run(Load(gva, size), user)
        if kind == WRITE:
            return cpu.run(Store(gva, size, eax & ((1 << 8 * size) - 1)), user)
        if kind == XCHG:
            return cpu.run(Exchange(gva, size, eax), user)
        if kind == FETCH:
            pfn = cpu.translate(gva, FETCH, user)
            if pfn < 0:
                return cpu.fault(FETCH)
            self.used.append(pfn * PAGE | gva % PAGE)
            return Done(self.used[0])
        assert kind in (XOR, LOCK_XOR)
        old = cpu.run(CompareExchange(gva, size, 1 << 64, 0), user)
        if not isinstance(old, Done):
            return old
        self.used.clear()
        return cpu.run(Store(gva, size, old.value ^ eax), user)

    def case(self, case: dict[str, int]) -> dict[str, int]:
        """Run one row and return its `after` columns as this CPU makes them, and `memory`."""
        entries = self.entries(case)
        for name, at in entries.items():
            self.ram.store(at, 4, case[name])
        cpu, cr4 = self.cpu, case["cr4"]
        cpu.flush_all()
        cpu.set_modes(
            wp=bool(case["cr0"] >> 16 & 1), pse=bool(cr4 >> 4 & 1), pge=bool(cr4 >> 7 & 1),
            nxe=False,
        )  # fmt: skip
        cpu.load_root(case["cr3"])
        self.used.clear()
        stop = self.run(case)
        after: dict[str, int] = dict.fromkeys(RESULTS, 0)
        if isinstance(stop, PageFault):
            after.update(fault=1, error=stop.error, cr2=stop.gva)
        else:
            assert isinstance(stop, Done)
            after["phys_a"], *second = self.used
            after["phys_b"] = second[0] if second else 0
            gives = case["kind"] in (READ, XCHG, FETCH)
            after["value"] = stop.value if gives else case["operand"]
        for name in ("pde_a", "pte_a", "pde_b", "pte_b"):
            after[name + "_after"] = self.read(entries[name], 4) if name in entries else 0
        for at in entries.values():
            self.ram.store(at, 4, 0)
        after["memory"] = self.take_back(case, after)
        return after

    def take_back(self, case: dict[str, int], after: dict[str, int]) -> int:
        """Return what now stands where the access went, and restore the pattern there."""
        value = shift = 0
        size, a, b = case["size"], after["phys_a"], after["phys_b"]
        in_a = min(size, PAGE - a % PAGE)
        for at, n in ((a, in_a), (b, size - in_a)):
            if not after["fault"] and n:
                value |= self.read(at, n) << shift
                shift += 8 * n
                if at < END_OF_RAM:
                    first, last = at >> 2, (at + n - 1 >> 2) + 1
                    self.ram.array32[first:last] = pattern(first, last)
        return value

    def memory_before(self, case: dict[str, int]) -> int:
        """Return what the pattern holds where the recorded access went; all ones beyond RAM."""
        value = shift = 0
        in_a = min(case["size"], PAGE - case["phys_a"] % PAGE)
        for at, n in ((case["phys_a"], in_a), (case["phys_b"], case["size"] - in_a)):
            value |= self.read(at, n) << shift
            shift += 8 * n
        return value


def wanted_memory(case: dict[str, int], before: int) -> int:
    """Return what memory must hold after the access; writes beyond RAM vanish."""
    if case["fault"]:
        return 0
    ones = (1 << 8 * case["size"]) - 1
    if case["phys_a"] >= END_OF_RAM:
        return ones
    return {
        READ: before, FETCH: before, WRITE: case["operand"] & ones, XCHG: case["operand"] & ones,
        XOR: before ^ case["operand"], LOCK_XOR: before ^ case["operand"],
    }[case["kind"]]  # fmt: skip


@pytest.mark.shows("H1", "H2")
@pytest.mark.parametrize("engine", ENGINES)
def test_every_recorded_access_ends_as_recorded_bit_by_bit(engine: str) -> None:
    bench = Bench(engine)
    cases = rows("mmu_cases_sample.npz")
    differing = []
    for number, case in enumerate(cases):
        wanted = {key: case[key] for key in case if key.endswith("_after")}
        wanted |= {key: case[key] for key in RESULTS}
        before = 0 if case["fault"] else bench.memory_before(case)
        wanted["memory"] = wanted_memory(case, before)
        found = bench.case(case)
        if case["fault"]:
            # A of what was read before the fault (and A, D of a first page) may be set or not.
            for key in ("pde_a", "pte_a", "pde_b", "pte_b"):
                assert wanted[f"{key}_after"] & ~0x60 == case[key] & ~0x60
                wanted[f"{key}_after"] &= ~0x60
                found[f"{key}_after"] &= ~0x60
        if found != wanted:
            differing.append((number, found, wanted))
    assert differing == []
    assert len(cases) == 2000


@dataclass
class Snapshot:
    """One CPU of a snapshot: its registers, RAM with the tables, and what they map."""

    registers: dict[str, Any]
    ram: Ram
    tables: dict[int, npt.NDArray[np.uint32]]  # as they were: looking sets A
    mapped: list[tuple[int, int, int]]  # linear, physical, flags


def snapshots() -> Iterator[Snapshot]:
    with np.load(DATA / "walk_sample_ia32.npz") as file:
        for snapshot in json.loads(bytes(file["meta"])):
            s = snapshot["snapshot"]
            frames, pages = file[f"s{s}_frames"], file[f"s{s}_pages"]
            tables = dict(zip(frames.tolist(), pages.view(np.uint32), strict=True))
            for c, registers in enumerate(snapshot["cpus"]):
                ram = Ram(snapshot["ram_bytes"] // PAGE)
                ram.array.reshape(-1, PAGE)[frames] = pages
                columns = [file[f"s{s}_cpu{c}_{name}"].tolist() for name in LEAF_COLUMNS]
                yield Snapshot(registers, ram, tables, sorted(zip(*columns, strict=True)))


def translations(cpu: PhysicalCpu, snapshot: Snapshot) -> Iterator[tuple[int, int, int]]:
    """Yield each leaf the CPU can reach, by asking it for every page there might be."""
    reg, linear = cpu.reg, 0
    while linear < 1 << 32:
        pfn = cpu.translate(linear, READ, False)
        step = PAGE
        if pfn >= 0:
            level = reg[m.R_LEVEL]
            at = reg[m.R_PATH + level]
            leaf = int(snapshot.tables[at // PAGE][at % PAGE // 4])
            flags = sum((leaf >> bit & 1) << flag for bit, flag in FLAG_OF_BIT.items())
            yield linear, pfn * PAGE, flags | (LARGE_LEAF if level else 0)
            step = LARGE_BYTES if level else PAGE
        elif not snapshot.ram.load(snapshot.registers["cr3"] + 4 * (linear >> 22), 4) & 1:
            step = LARGE_BYTES
        linear += step


@pytest.mark.shows("H2")
def test_the_translations_of_a_kernels_tables_are_exactly_its_list() -> None:
    for snapshot in snapshots():
        cr0, cr3, cr4 = (snapshot.registers[name] for name in ("cr0", "cr3", "cr4"))
        cpu = PhysicalCpu(0, IA32, snapshot.ram, Tlb(IA32, TlbGeometry(4, 1, 0)))
        cpu.set_modes(
            wp=bool(cr0 >> 16 & 1), pse=bool(cr4 >> 4 & 1), pge=bool(cr4 >> 7 & 1), nxe=False
        )
        cpu.load_root(cr3)
        assert list(translations(cpu, snapshot)) == snapshot.mapped
