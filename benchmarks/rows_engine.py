"""The access-block loop: references a second, counting on, against simpler and other loops.

Four streams of single references (a run of one each): `seq`, 64 references a page; `lcg`, uniform
over 64 Ki pages; `zipf`, skewed over the same, 30 % writes; `recording`, the process with most
references of a shipped recording, its runs expanded. x86-64 paging, the machine's default TLB.
Processor time.

uncounted: the kernels' own source with every counter and the note of the frame used taken out,
compiled in the same way: rights, paging-structure cache, D and the budget stay. Both run in the
machine's quanta, between which a machine looks at what was counted and notes where it goes on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from time import process_time
from typing import Any

import numpy as np
import numpy.typing as npt
from engine_streams import RECORDING, STREAMS, coded_recording, expanded
from engine_variants import uncounted_kernels
from harness import Kind, Line, Row, Sampler, Side, Summary, Unavailable, pair

from penumbra.actors.check import Oracle
from penumbra.actors.machine.config import MachineConfig
from penumbra.hw import mmu_layout as m
from penumbra.hw.compiled import Kernels, kernels_for
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.formats import CR0_PE, CR0_PG, CR0_WP, CR4_PAE, EFER_NXE, X86_64, A, D, P, U, W
from penumbra.hw.memory import Ram
from penumbra.hw.operations import Block
from penumbra.hw.streams import AccessStream
from penumbra.hw.tlb import Tlb, TlbGeometry

N_PLAIN = 30_000
N_DATA_FRAMES = 1024
_ALL = P | W | U


class Tables:
    """RAM in which x86-64 tables map a set of pages to a thousand frames."""

    def __init__(self, pages: npt.NDArray[np.int64]) -> None:
        upper = {
            (level, int(part))
            for level in (0, 1, 2)
            for part in np.unique(pages >> 9 * (level + 1))
        }
        self.root = 1
        first_data = 2 + len(upper)
        self.ram = Ram(first_data + N_DATA_FRAMES)
        frames = {(3, 0): self.root}
        for number, (level, part) in enumerate(sorted(upper, reverse=True)):
            frames[level, part] = 2 + number
            above = frames[level + 1, part >> 9]
            self.ram.u64[above << 9 | part & 511] = 2 + number << 12 | _ALL
        words = self.ram.u64
        for number, page in enumerate(pages.tolist()):
            frame = first_data + number % N_DATA_FRAMES
            words[frames[0, page >> 9] << 9 | page & 511] = frame << 12 | _ALL | A | D


class Loop:
    """One CPU running one stream again and again, after a first time that fills what it may."""

    def __init__(self, stream: AccessStream, kernels: Kernels, *, checked: bool = False) -> None:
        config = MachineConfig()
        self.stream = stream
        tables = Tables(stream.pages)
        geometry = TlbGeometry(config.tlb_entries, config.tlb_ways, config.psc_slots)
        tlb = Tlb(X86_64, geometry)
        self.cpu = PhysicalCpu(0, X86_64, tables.ram, tlb, [stream], kernels)
        self.cpu.set_modes(wp=True, pse=False, pge=False, nxe=True)
        self.cpu.load_root(tables.root << 12)
        self.quantum = config.quantum
        self.oracle: Oracle | None = None
        if checked:
            self._check(tables)
        self.side()

    def _check(self, tables: Tables) -> None:
        oracle = self.oracle = Oracle("x86-64", 1, tables.ram.bytes, tables.ram.flags)
        for frame in range(tables.ram.n_frames):
            oracle.grant(frame, frame)
        cr0 = CR0_PE | CR0_PG | CR0_WP
        oracle.registers(0, cr0, tables.root << 12, CR4_PAE, EFER_NXE)
        self.cpu.on_block = lambda sid, stream, start, used: oracle.block(
            0, sid, stream, start, used
        )

    def side(self) -> float:
        """Seconds per reference, the whole stream in quanta of progress."""
        reg, at, n = self.cpu.reg, 0, len(self.stream.runs)
        start = process_time()
        while at < n:
            reg[m.R_PROGRESS], reg[m.R_LIMIT] = 0, self.quantum
            stop = self.cpu.run(Block(0, at, n), user=True)
            at = getattr(stop, "at", n)
        took = process_time() - start
        if self.oracle is not None:
            verdict = self.oracle.verdict()
            assert verdict.coherent, verdict.explain()
        return took / self.stream.n_references


def compiled() -> Kernels:
    if importlib.util.find_spec("numba") is None:
        raise Unavailable("numba is not installed (extra `fast`)")
    return kernels_for(X86_64, "numba")


@cache
def counted(name: str) -> Loop:
    return Loop(expanded(name), compiled())


@contextmanager
def against_uncounted(name: str, checked: bool) -> Iterator[Sampler]:
    stream = expanded(name)
    row = Loop(stream, compiled(), checked=True) if checked else counted(name)
    yield pair(Loop(stream, uncounted_kernels()).side, row.side)


@contextmanager
def against_plain(name: str) -> Iterator[Sampler]:
    row = counted(name)
    stream = expanded(name)
    start = AccessStream(stream.pages, stream.runs[:N_PLAIN], stream.salt)
    yield pair(Loop(start, kernels_for(X86_64, "plain")).side, row.side)


@contextmanager
def against_pycachesim(name: str) -> Iterator[Sampler]:
    """One cache of 4 KiB lines with the TLB's sets and ways; it counts loads and nothing else."""
    row = counted(name)
    if importlib.util.find_spec("cachesim") is None:
        raise Unavailable("pycachesim is not installed (extra `bench`)")
    yield pair(cachesim_side(expanded(name)), row.side)


def cachesim_side(stream: AccessStream) -> Side:
    from cachesim import Cache, CacheSimulator, MainMemory

    config = MachineConfig()
    memory = MainMemory()
    cache_: Any = Cache("TLB", config.tlb_entries // config.tlb_ways, config.tlb_ways, 4096, "LRU")
    memory.load_to(cache_)
    memory.store_from(cache_)
    simulator = CacheSimulator(cache_, memory)
    addresses = (stream.pages[stream.runs >> 40] << 12).tolist()

    def side() -> float:
        start = process_time()
        simulator.load(addresses, length=1)
        return (process_time() - start) / len(addresses)

    side()
    return side


@contextmanager
def coded() -> Iterator[Sampler]:
    yield pair(counted(RECORDING).side, Loop(coded_recording(), compiled()).side)


def group(
    name: str, what: str, opened: Callable[[str], Any], worst: float, median: float | None = None
) -> list[Line]:
    """Return a row per stream, their worst, and their median if that has a reach."""
    rows: list[Line] = [
        Row(f"engine/{name}-{stream}", f"{what}, {stream}", Kind.SPEED, None,
            partial(opened, stream))
        for stream in STREAMS
    ]  # fmt: skip
    of = tuple(row.name for row in rows)
    rows.append(Summary(f"engine/{name}-worst", f"{what}: worst", Kind.SPEED, worst, of))
    if median is not None:
        line = Summary(f"engine/{name}-median", f"{what}: median", Kind.SPEED, median, of, False)
        rows.append(line)
    return rows


LINES: tuple[Line, ...] = (
    *group("counted", "counting ÷ the same loop uncounted",
           partial(against_uncounted, checked=False), 0.65, 0.75),
    *group("checked", "counting and checked, in quanta ÷ the same loop uncounted",
           partial(against_uncounted, checked=True), 0.5),
    *group("cachesim", "counting ÷ pycachesim used as a TLB", against_pycachesim, 1.1),
    *group("plain", "counting ÷ the plain engine", against_plain, 25.0),
    Row("engine/coded", "a recording's page runs ÷ its single references",
        Kind.SPEED, 1.5, coded),
)  # fmt: skip
