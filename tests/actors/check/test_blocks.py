"""Access blocks: judged as single accesses are, remembered, forgotten as entries change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .rig import LINK, PSE, READ, USED, WRITE, A, D, Rig, W

Ints = npt.NDArray[np.int64]
ROOT, TABLE = 0x1000, 0x4000
N_PAGES = 6


@dataclass(frozen=True)
class Stream:
    pages: Ints
    runs: Ints


def stream_of(runs: list[tuple[int, int]], count: int = 3) -> Stream:
    """Return a stream of (page, kind) runs over the pages N_PAGES .. 1 of the address space."""
    words = [page << 40 | count << 14 | kind for page, kind in runs]
    return Stream(np.arange(N_PAGES, 0, -1), np.array(words, np.int64))


def mapped() -> Rig:
    """Return a guest whose page p lies in frame 8 + p."""
    rig = Rig("ia32", n_vcpus=2)
    rig.hardware(ROOT, TABLE | LINK)
    for page in range(1, N_PAGES + 1):
        rig.hardware(TABLE + 4 * page, (8 + page) << 12 | USED)
    rig.start(ROOT, PSE)
    return rig


def block(rig: Rig, stream: Stream, gfns: list[int], start: int = 0, vcpu: int = 0) -> None:
    used = np.array([rig.pfn(gfn) for gfn in gfns], np.int64)
    rig.oracle.block(vcpu, 7, stream, start, used)
    rig.oracle.check()


def counts(rig: Rig) -> tuple[int, int, int]:
    verdict = rig.oracle.verdict()
    return verdict.n_fresh, verdict.n_stale, verdict.n_violations


def test_runs_and_references_are_counted() -> None:
    rig = mapped()
    stream = stream_of([(0, READ), (1, WRITE), (0, READ), (5, READ)], count=1000)
    block(rig, stream, [14, 13])
    block(rig, stream, [14, 9], start=2)
    verdict = rig.oracle.verdict()
    assert (verdict.n_checked, verdict.n_references, verdict.n_fresh) == (4, 4000, 4)
    assert verdict.coherent


@pytest.mark.shows("C1")
def test_each_run_of_a_block_is_judged_by_its_own_frame() -> None:
    rig = mapped()
    stream = stream_of([(0, READ)] * 3 + [(1, READ)] * 3)
    rig.store(TABLE + 4 * N_PAGES, 20 << 12 | USED)
    block(rig, stream, [14, 20, 21, 13, 13, 21])
    assert counts(rig) == (3, 1, 2)


def test_a_store_to_an_entry_makes_its_page_asked_for_again() -> None:
    rig = mapped()
    stream = stream_of([(0, WRITE), (1, WRITE)])
    block(rig, stream, [14, 13])
    rig.store(TABLE + 4 * N_PAGES, 14 << 12 | (USED & ~W))
    rig.oracle.event(0, "INVLPG", N_PAGES << 12)
    block(rig, stream, [14, 13])
    assert counts(rig) == (3, 0, 1)


def test_a_store_to_an_upper_entry_makes_all_pages_below_it_asked_for_again() -> None:
    rig = mapped()
    stream = stream_of([(page, READ) for page in range(N_PAGES)])
    frames = [14 - page for page in range(N_PAGES)]
    block(rig, stream, frames)
    rig.store(ROOT, 0)
    block(rig, stream, frames)
    rig.oracle.event(0, "CR3", ROOT)
    block(rig, stream, frames)
    assert counts(rig) == (N_PAGES, N_PAGES, N_PAGES)


def test_a_dirty_bit_cleared_by_the_guest_is_asked_for_again() -> None:
    rig = mapped()
    stream = stream_of([(0, WRITE)])
    block(rig, stream, [14])
    rig.store(TABLE + 4 * N_PAGES, 14 << 12 | (USED & ~D))
    rig.oracle.event(0, "INVLPG", N_PAGES << 12)
    block(rig, stream, [14])
    rig.hardware(TABLE + 4 * N_PAGES, 14 << 12 | USED)
    block(rig, stream, [14])
    assert counts(rig) == (2, 0, 1)


def test_each_root_has_its_own_answers() -> None:
    rig = mapped()
    stream = stream_of([(0, READ)])
    rig.hardware(0x2000, 0x5000 | LINK)
    rig.hardware(0x5000 + 4 * N_PAGES, 20 << 12 | USED)
    for root, frame in ((ROOT, 14), (0x2000, 20), (ROOT, 14), (0x2000, 14)):
        rig.oracle.event(0, "CR3", root)
        block(rig, stream, [frame])
    assert counts(rig) == (3, 0, 1)


def test_a_moved_guest_frame_makes_its_pages_asked_for_again() -> None:
    rig = mapped()
    stream = stream_of([(0, READ)])
    block(rig, stream, [14])
    rig.oracle.grant(14, 50)
    block(rig, stream, [14])
    rig.oracle.block(0, 7, stream, 0, np.array([50]))
    assert counts(rig) == (2, 0, 1)


def test_no_frame_at_all_is_not_taken_for_an_answer_not_yet_known() -> None:
    rig = mapped()
    rig.oracle.block(0, 7, stream_of([(0, READ)]), 0, np.array([-1]))
    assert counts(rig) == (0, 0, 1)


LEAVES = [0, 9 << 12 | USED, 14 << 12 | USED, 14 << 12 | (USED & ~W), 14 << 12 | (USED & ~(A | D))]
STEPS = st.one_of(
    st.tuples(st.just("store"), st.integers(1, 3), st.sampled_from(LEAVES)),
    st.tuples(st.just("link"), st.just(0), st.sampled_from([0, TABLE | LINK, 0x5000 | LINK])),
    st.tuples(st.just("invlpg"), st.integers(1, 3), st.integers(0, 1)),
    st.tuples(st.just("root"), st.just(0), st.integers(0, 1)),
)
RUNS = st.tuples(st.integers(3, 5), st.integers(0, 2), st.sampled_from([9, 10, 14]))
TURNS = st.lists(
    st.tuples(STEPS, st.lists(RUNS, min_size=1, max_size=8), st.integers(0, 1)), max_size=12
)


@pytest.mark.shows("C1")
@given(turns=TURNS)
@settings(max_examples=80, deadline=None)
def test_a_block_is_judged_as_its_runs_one_by_one(turns: list[Any]) -> None:
    one_by_one, in_blocks = mapped(), mapped()
    for step, runs, vcpu in turns:
        for rig in (one_by_one, in_blocks):
            do(rig, step)
        stream = stream_of([(page, kind) for page, kind, _ in runs])
        block(in_blocks, stream, [gfn for _, _, gfn in runs], vcpu=vcpu)
        for page, kind, gfn in runs:
            one_by_one.uses((N_PAGES - page) << 12, gfn, kind, vcpu=vcpu)
    assert counts(in_blocks) == counts(one_by_one)


def do(rig: Rig, step: tuple[str, int, int]) -> None:
    what, page, value = step
    if what == "store":
        rig.store(TABLE + 4 * page, value)
    elif what == "link":
        rig.store(ROOT, value)
    elif what == "invlpg":
        rig.oracle.event(value, "INVLPG", page << 12)
    else:
        rig.oracle.event(value, "CR3", ROOT)


@pytest.mark.parametrize("n_runs", [0, 1, 5000])
def test_a_block_may_have_any_length(n_runs: int) -> None:
    rig = mapped()
    stream = stream_of([(run % N_PAGES, READ) for run in range(n_runs)])
    block(rig, stream, [14 - run % N_PAGES for run in range(n_runs)])
    assert counts(rig) == (n_runs, 0, 0)
