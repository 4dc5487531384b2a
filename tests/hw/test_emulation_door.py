"""`next_accesses` and `complete` come to what `run` does: what a monitor emulates is the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import mmu_layout as m
from penumbra.hw import operations as o
from penumbra.hw.exits import Done, GeneralProtection
from penumbra.hw.formats import IA32
from penumbra.hw.streams import AccessStream, pack_runs

from .rig import PAGE, WRITE, Rig

BASE, FRAMES = 0x0040_0000, (40, 50, 45)
VALUE = st.integers(0, (1 << 64) - 1)
Stores: TypeAlias = (
    o.Store | o.Exchange | o.XorMemory | o.CompareExchange | o.Fill | o.Copy | o.Block
)

gvas = st.one_of(st.integers(0, 3 * PAGE - 8), st.integers(PAGE - 8, PAGE)).map(BASE.__add__)
word_gvas = st.integers(0, 2 * 512).map(lambda word: BASE + 8 * word)
sizes = st.sampled_from([1, 2, 4, 8])
n_bytes = st.integers(1, 512).map(lambda n: 8 * n)
works = st.one_of(
    st.builds(o.Store, gvas, sizes, VALUE),
    st.builds(o.Exchange, gvas, sizes, VALUE),
    st.builds(o.XorMemory, gvas, sizes, VALUE),
    st.builds(o.CompareExchange, gvas, sizes, st.sampled_from([0, 1]), VALUE),
    st.builds(o.Fill, word_gvas, n_bytes, VALUE),
    st.builds(o.Copy, word_gvas, word_gvas, n_bytes),
    st.builds(lambda start, n: o.Block(0, start, start + n), st.integers(0, 5), st.integers(1, 5)),
)


def stream() -> AccessStream:
    columns = np.array(
        [[0, 1, 4, 10], [1, 1, 1, 4088], [2, 0, 7, 0], [2, 2, 9, 64], [0, 1, 1, 0]] * 2, np.int64
    )
    pages = np.arange(BASE // PAGE, BASE // PAGE + 3)
    return AccessStream(pages, pack_runs(*columns.T), salt=3)


def machine() -> Rig:
    rig = Rig(IA32, streams=[stream()])
    for page, pfn in enumerate(FRAMES):
        rig.map(BASE + page * PAGE, pfn)
        rig.ram.array64[pfn << 9 : (pfn + 1) << 9] = range(page, page + 512)
        rig.ram.flags[pfn] = page == 1
    return rig


def emulate(rig: Rig, work: Stores) -> Done:
    """Do `work` as a monitor would: translate, then complete, step by step."""
    at = 0
    while True:
        hpas: list[int] = []
        for gva, n, kind in rig.cpu.next_accesses(work, at):
            assert gva % PAGE + n <= PAGE
            hpas.append(rig.cpu.translate(gva, kind, True) * PAGE | gva % PAGE)
        done, after = rig.cpu.complete(work, at, hpas)
        assert not isinstance(done, GeneralProtection)
        if done is not None:
            return done
        assert after > at
        at = after


def state(rig: Rig) -> tuple[bytes, Sequence[tuple[int, int, int, int]], int]:
    return bytes(rig.ram.bytes), rig.flagged, rig.cpu.reg[m.R_REFERENCES]


@pytest.mark.shows("H1")
@settings(deadline=None, max_examples=250)
@given(work=works)
def test_a_store_emulated_step_by_step_is_the_store_run_at_once(work: Stores) -> None:
    ran, emulated = machine(), machine()
    assert emulate(emulated, work) == ran.cpu.run(work, user=True)
    # A run that reads is left to the CPU by any monitor; emulated, it stores nothing.
    assert state(emulated) == state(ran)


@pytest.mark.shows("H1")
def test_a_step_names_every_byte_it_touches_page_by_page() -> None:
    cpu = machine().cpu
    assert [cpu.next_accesses(work, at) for work, at in (
        (o.Store(BASE + PAGE - 3, 8, 0), 0),
        (o.Load(BASE + PAGE - 3, 8), 0),
        (o.SpinUntil(BASE, 8, 1, 0), 0),
        (o.Fill(BASE, 64, 0), 16),
        (o.Copy(BASE, BASE + PAGE, 64), 8),
        (o.Block(0, 1, 5), 0),
    )] == [
        [(BASE + PAGE - 3, 3, WRITE), (BASE + PAGE, 5, WRITE)],
        [(BASE + PAGE - 3, 3, 0), (BASE + PAGE, 5, 0)],
        [(BASE, 8, 0)],
        [(BASE + 16, 8, WRITE)],
        [(BASE + PAGE + 8, 8, 0), (BASE + 8, 8, WRITE)],
        [(BASE + PAGE + 4088, 8, WRITE)],
    ]  # fmt: skip


@pytest.mark.shows("H1")
@pytest.mark.parametrize("work", [o.Syscall("x"), o.Invlpg(BASE), o.Halt()])
def test_what_accesses_nothing_has_no_step_to_emulate(work: o.Operation) -> None:
    with pytest.raises(TypeError, match="makes no access to emulate"):
        machine().cpu.next_accesses(work, 0)
