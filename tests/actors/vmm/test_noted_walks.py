"""What a walk registers before anything is derived from it (Fig. 8, step 812)."""

from __future__ import annotations

from penumbra.actors.core import Matrix
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.walk import REGISTERS, Step

TOP, LEAF = Step.at(1, 0x5008, 0x6027, 8), Step.at(0, 0x6010, 0x8067, 8)


def traced(*gfns: int) -> WriteTraces:
    traces = WriteTraces(Matrix(2, 4))
    for gfn in gfns:
        traces.place(gfn)
    return traces


def test_nothing_is_noted_while_a_table_on_the_path_is_not_traced() -> None:
    traces = traced(5)
    assert traces.note_walk([TOP, LEAF], 1) == (6,)
    assert traces.consumers(5, 1) == 0
    assert not traces.is_upper(5)


def test_what_is_news_to_any_of_the_vcpus_has_to_be_read_again() -> None:
    traces = traced(5, 6)
    assert traces.note_walk([TOP, LEAF], 0b01) == [TOP, LEAF]
    assert traces.note_walk([TOP, LEAF], 0b01) == []
    assert traces.note_walk([TOP, LEAF], 0b11) == [TOP, LEAF]
    assert traces.consumers(6, 2) == 0b11
    assert (traces.is_upper(5), traces.is_upper(6)) == (True, False)


def test_a_walk_ends_what_counts_as_a_flood_of_stores() -> None:
    traces = traced(5, 6)
    traces.note_walk([TOP, LEAF], 1)
    assert [traces.note_store(6) for _ in range(3)] == [1, 2, 3]
    traces.note_walk([TOP, LEAF], 1)
    assert traces.note_store(6) == 1


def test_a_leaf_table_may_be_out_of_sync_and_an_upper_one_may_not() -> None:
    traces = traced(5, 6)
    traces.lift(6)
    assert traces.note_walk([TOP, LEAF], 1) == [TOP, LEAF]
    traces.lift(5)
    assert traces.note_walk([TOP, LEAF], 1) == (5,)


def test_an_entry_in_a_register_is_of_no_table() -> None:
    traces = traced(6)
    held = Step(1, REGISTERS << 12, 0x6001, REGISTERS, 0)
    assert traces.note_walk([held, LEAF], 1) == [LEAF]
