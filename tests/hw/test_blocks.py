"""Access blocks: resumed anywhere they equal one run, and a flagged frame sees each store."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import mmu_layout as m
from penumbra.hw.exits import BudgetSpent, Done, Exit, PageFault
from penumbra.hw.formats import IA32, X86_64
from penumbra.hw.operations import Block
from penumbra.hw.streams import AccessStream, pack_runs

from .rig import ALL, ENGINES, FETCH, NX, PAGE, READ, WRITE, P, Rig, U, W

N_PAGES, SALT = 6, 5
BASE_VPN = 0x400
Run = tuple[int, int, int, int]  # page, kind, count, offset

run_columns = st.tuples(
    st.integers(0, N_PAGES - 1), st.integers(0, 2), st.integers(1, 9), st.integers(0, 4095)
)
runs_lists = st.lists(run_columns, min_size=1, max_size=30)


def stream_of(runs: list[Run]) -> AccessStream:
    columns = np.array(runs, np.int64).reshape(-1, 4)
    stream = AccessStream(np.arange(BASE_VPN, BASE_VPN + N_PAGES), pack_runs(*columns.T), SALT)
    stream.check()
    return stream


@dataclass
class Bench:
    """A machine with one stream, its pages mapped to frames 40 up; collects what is reported."""

    runs: list[Run]
    engine: str = "plain"
    limit: int = 1 << 40
    pieces: list[tuple[int, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rig = Rig(IA32, self.engine, streams=[stream_of(self.runs)])
        for page in range(N_PAGES):
            self.rig.map((BASE_VPN + page) << 12, 40 + page)
        self.rig.cpu.on_block = self.note
        self.rig.cpu.reg[m.R_LIMIT] = self.limit

    def note(
        self, stream_id: int, stream: AccessStream, start: int, used: npt.NDArray[np.int64]
    ) -> None:
        assert (stream_id, stream) == (0, stream_of(self.runs))
        self.pieces.append((start, used.tolist()))

    def run(self, start: int = 0, at: int = 0) -> Exit:
        return self.rig.cpu.run(Block(0, start, len(self.runs)), user=True, at=at)

    def used(self) -> list[int]:
        """Return the frames of all runs reported, which must follow each other without a gap."""
        frames: list[int] = []
        for start, piece in self.pieces:
            assert start == len(frames)
            frames += piece
        return frames

    def state(self) -> tuple[bytes, list[int], int, list[int]]:
        reg = self.rig.cpu.reg
        return (
            bytes(self.rig.ram.bytes), self.rig.tlb.array.tolist(), reg[m.R_PROGRESS], self.used()
        )  # fmt: skip


def expected_words(runs: list[Run]) -> dict[tuple[int, int], int]:
    """Return what the write runs leave behind: (page, offset rounded down) to value."""
    return {
        (page, offset & ~7): (SALT << 40) + i
        for i, (page, kind, _, offset) in enumerate(runs)
        if kind == WRITE
    }


@pytest.mark.shows("H2", "H4")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_stores_each_write_run_and_reports_the_frame_of_every_run(engine: str) -> None:
    @settings(deadline=None, max_examples=60)
    @given(runs=runs_lists)
    def run(runs: list[Run]) -> None:
        bench = Bench(runs, engine)
        assert bench.run() == Done()
        total = sum(count for _, _, count, _ in runs)
        reg = bench.rig.cpu.reg
        assert (reg[m.R_PROGRESS], reg[m.R_REFERENCES]) == (total, total)
        assert bench.used() == [40 + page for page, _, _, _ in runs]
        words = expected_words(runs)
        ram = bench.rig.ram
        for page in range(N_PAGES):
            for at in range(0, PAGE, 8):
                assert ram.load((40 + page) * PAGE + at, 8) == words.get((page, at), 0)

    run()


@pytest.mark.shows("H4", "H9")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_cut_by_any_budgets_and_faults_equals_one_run(engine: str) -> None:
    @settings(deadline=None, max_examples=80)
    @given(
        runs=runs_lists,
        budgets=st.lists(st.integers(1, 25), min_size=1),
        flagged=st.sets(st.integers(0, N_PAGES - 1)),
        missing=st.sets(st.integers(0, N_PAGES - 1)),
    )
    def run(runs: list[Run], budgets: list[int], flagged: set[int], missing: set[int]) -> None:
        whole = Bench(runs, engine)
        assert whole.run() == Done()
        cut = Bench(runs, engine, limit=0)
        for page in flagged:
            cut.rig.ram.flags[40 + page] = 1
        missing &= {page for page, _, _, _ in runs}
        for page in missing:
            cut.rig.map((BASE_VPN + page) << 12, 0, 0)
        reg, at = cut.rig.cpu.reg, 0
        stop: Exit | None = None
        for turn in range(2 * len(runs) + 2):
            reg[m.R_LIMIT] = reg[m.R_PROGRESS] + budgets[turn % len(budgets)]
            stop = cut.run(at=at)
            if stop == Done():
                break
            assert isinstance(stop, BudgetSpent | PageFault)
            at = stop.at
            if isinstance(stop, PageFault):
                page = (stop.gva >> 12) - BASE_VPN
                missing.remove(page)
                cut.rig.map(stop.gva & ~0xFFF, 40 + page)
            else:
                # The run that crosses the limit is the last: runs are never split.
                assert reg[m.R_PROGRESS] - runs[at - 1][2] < reg[m.R_LIMIT] <= reg[m.R_PROGRESS]
        assert (stop, missing) == (Done(), set())
        assert cut.state() == whole.state()
        assert [store[0] // PAGE - 40 for store in cut.rig.flagged] == [
            page for page, kind, _, _ in runs if kind == WRITE and page in flagged
        ]

    run()


@pytest.mark.shows("H2")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("kind", "rights", "error"),
    [(READ, 0, 4), (WRITE, 0, 6), (WRITE, P | U, 7), (READ, P | W, 5), (FETCH, 0, 4)],
)
def test_a_block_stops_before_the_run_that_faults_and_goes_on_there(
    engine: str, kind: int, rights: int, error: int
) -> None:
    runs = [(0, WRITE, 2, 8), (1, kind, 3, 0x123), (2, READ, 4, 0)]
    bench = Bench(runs, engine)
    gva = (BASE_VPN + 1) << 12
    bench.rig.map(gva, 41, rights)
    assert bench.run() == PageFault(gva | 0x123, error, at=1, kind=kind)
    assert (bench.used(), bench.rig.cpu.reg[m.R_PROGRESS]) == ([40], 2)
    bench.rig.map(gva, 41, ALL)
    assert bench.run(at=1) == Done()
    assert (bench.used(), bench.rig.cpu.reg[m.R_PROGRESS]) == ([40, 41, 42], 9)


@pytest.mark.shows("H3", "H4")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("rights", "kind", "error"),
    [(P | W, READ, 5), (P | W, WRITE, 7), (P | U, WRITE, 7), (P | U | NX, FETCH, 0x15)],
)
def test_a_block_is_denied_what_a_cached_entry_does_not_grant(
    engine: str, rights: int, kind: int, error: int
) -> None:
    rig = Rig(X86_64, engine, streams=[stream_of([(0, kind, 1, 0)])])
    gva = BASE_VPN << 12
    rig.map(gva, 40, rights)
    rig.cpu.set_modes(wp=False, pse=True, pge=True, nxe=True)
    assert rig.writes(gva, user=False) == 40
    assert rig.cpu.run(Block(0, 0, 1), user=True) == PageFault(gva, error, kind=kind)


@pytest.mark.shows("H1")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_write_run_to_a_flagged_frame_is_told_after_the_runs_before_it(engine: str) -> None:
    runs = [
        (0, WRITE, 1, 0),
        (1, WRITE, 2, 13),
        (1, READ, 3, 0),
        (1, WRITE, 4, 13),
        (2, FETCH, 5, 0),
    ]
    bench = Bench(runs, engine)
    bench.rig.ram.flags[41] = 2
    seen: list[tuple[tuple[int, int, int, int], int, int]] = []
    bench.rig.cpu.on_flagged = lambda *store: seen.append(
        (store, len(bench.used()), bench.rig.ram.load(41 * PAGE + 8, 8))
    )
    assert bench.run() == Done()
    hpa, salt = 41 * PAGE + 8, SALT << 40
    assert seen == [
        ((hpa, 8, 0, salt + 1), 1, salt + 1),
        ((hpa, 8, salt + 1, salt + 3), 3, salt + 3),
    ]
    assert bench.used() == [40, 41, 41, 41, 42]
    assert bench.rig.cpu.reg[m.R_REFERENCES] == 15


@pytest.mark.shows("H1")
@pytest.mark.parametrize("engine", ENGINES)
def test_write_runs_beyond_ram_vanish(engine: str) -> None:
    bench = Bench([(0, WRITE, 1, 0), (1, WRITE, 1, 0)], engine)
    bench.rig.map(BASE_VPN << 12, 64)
    before = sum(bench.rig.ram.array64[40 << 9 :].tolist())
    assert bench.run() == Done()
    assert bench.used() == [64, 41]
    assert sum(bench.rig.ram.array64[40 << 9 :].tolist()) == before + (SALT << 40) + 1


@pytest.mark.shows("H1")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_starts_at_its_start_and_an_empty_one_does_nothing(engine: str) -> None:
    bench = Bench([(0, WRITE, 1, 0), (1, WRITE, 1, 0), (2, WRITE, 1, 0)], engine)
    assert bench.run(start=2) == Done()
    assert bench.pieces == [(2, [42])]
    assert bench.rig.cpu.run(Block(0, 1, 1), user=True) == Done()
    assert bench.pieces == [(2, [42])]


@pytest.mark.shows("H1")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_longer_than_any_before_it_is_reported_whole(engine: str) -> None:
    runs = [(i % N_PAGES, READ, 1, 0) for i in range(3000)]
    bench = Bench(runs, engine)
    assert bench.run() == Done()
    assert bench.used() == [40 + i % N_PAGES for i in range(3000)]
