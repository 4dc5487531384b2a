"""The run builder against the rule written out one reference at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.guest.traces import runs
from penumbra.guest.traces.runs import RunBuilder
from penumbra.hw.streams import (
    COUNT_SHIFT,
    FETCH,
    MAX_COUNT,
    OFFSET_SHIFT,
    PAGE_SHIFT,
    READ,
    WRITE,
    AccessStream,
)

Reference = tuple[int, int, int]  # kind, address, size
CALL = None

a_reference = st.tuples(
    st.sampled_from((READ, WRITE, FETCH)),
    st.builds(
        lambda page, offset: (page << 12) + offset,
        st.integers(1, 4),
        st.sampled_from((0, 8, 4090, 4095)),
    ),
    st.sampled_from((1, 8)),
)


@dataclass
class Run:
    vpn: int
    kind: int
    count: int
    offset: int


def by_the_rule(items: list[Reference | None]) -> tuple[list[Run], list[int]]:
    """Runs in order of first reference, and the run index of each call."""
    done: list[Run] = []
    calls: list[int] = []
    open_run: dict[bool, Run] = {}
    for item in items:
        if item is None:
            calls.append(len(done))
            open_run.clear()
            continue
        kind, address, size = item
        touched = [(address >> 12, address & 4095)]
        if (address + size - 1) >> 12 != address >> 12:
            touched.append(((address >> 12) + 1, 0))
        for vpn, offset in touched:
            run = open_run.get(kind == FETCH)
            if run is None or run.vpn != vpn:
                run = open_run[kind == FETCH] = Run(vpn, kind, 0, offset)
                done.append(run)
            if kind == WRITE and run.kind == READ:
                run.kind, run.offset = WRITE, offset
            run.count += 1
    return done, calls


def build(blocks: list[list[Reference | None]]) -> tuple[AccessStream, list[int]]:
    builder = RunBuilder()
    for block in blocks:
        references = [item for item in block if item is not None]
        kind, address, size = zip(*references, strict=True) if references else ((), (), ())
        calls: list[int] = []
        n_references = 0
        for item in block:
            if item is None:
                calls.append(n_references)
            else:
                n_references += 1
        builder.add(
            np.array(kind, np.uint8),
            np.array(address, np.uint64),
            np.array(size, np.int64),
            calls,
        )
    return builder.finish(1)


def unpacked(stream: AccessStream) -> list[Run]:
    return [
        Run(
            int(stream.pages[word >> PAGE_SHIFT]),
            word & 3,
            (word >> COUNT_SHIFT) & MAX_COUNT,
            (word >> OFFSET_SHIFT) & 4095,
        )
        for word in stream.runs.tolist()
    ]


@given(st.lists(st.lists(st.one_of(a_reference, st.just(CALL)), max_size=30), max_size=4))
def test_runs_are_those_of_the_rule_wherever_blocks_are_cut(
    blocks: list[list[Reference | None]],
) -> None:
    stream, calls = build(blocks)
    stream.check()
    assert (unpacked(stream), calls) == by_the_rule([item for block in blocks for item in block])
    assert list(dict.fromkeys(run.vpn for run in unpacked(stream))) == stream.pages.tolist()


def test_a_store_inside_a_run_of_reads_gives_the_run_its_kind_and_offset() -> None:
    stream, _ = build([[(READ, 0x5004, 4), (FETCH, 0x1000, 3), (WRITE, 0x5020, 8)]])
    assert unpacked(stream) == [Run(5, WRITE, 2, 0x20), Run(1, FETCH, 1, 0)]


def test_a_run_longer_than_a_word_counts_becomes_several_and_calls_stay_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "MAX_COUNT", 4)
    stream, calls = build([[(READ, 0x1000, 1), *[(WRITE, 0x2008, 8)] * 9, CALL, (READ, 0x2000, 1)]])
    assert unpacked(stream) == [
        Run(1, READ, 1, 0),
        Run(2, WRITE, 4, 8),
        Run(2, WRITE, 4, 8),
        Run(2, WRITE, 1, 8),
        Run(2, READ, 1, 0),
    ]
    assert calls == [4]
