"""Write traces: a page each, with the interest of each VCPU per entry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.actors.core import Matrix
from penumbra.actors.vmm.traces import WriteTraces


@pytest.mark.shows("V6")
def test_a_trace_voids_every_derived_value_and_knows_nobody_yet() -> None:
    matrix = Matrix(2)
    traces = WriteTraces(matrix)
    count = matrix.count
    traces.place(5)
    assert (5 in traces, 6 in traces, matrix.count) == (True, False, count + 1)
    assert traces.consumers(5, 0) == 0


@pytest.mark.shows("V6", "P3", "A40 ¶95-96")
def test_consumers_are_noted_per_entry_and_forgotten_one_by_one() -> None:
    traces = WriteTraces(Matrix(3))
    traces.place(5)
    for vcpu in (0, 2):
        traces.register(5, 7, vcpu)
    traces.register(5, 8, 1)
    assert [traces.consumers(5, index) for index in (7, 8, 9)] == [0b101, 0b010, 0]
    traces.forget(5, 7, 0)
    traces.forget(5, 7, 1)  # was none
    assert [traces.consumers(5, index) for index in (7, 8, 9)] == [0b100, 0b010, 0]
    traces.forget(4, 0, 0)  # no such trace: whoever drops a shadow late need not ask
    traces.check()


@pytest.mark.shows("V6")
def test_stores_count_until_a_fill_goes_through_the_table() -> None:
    traces = WriteTraces(Matrix(1))
    traces.place(5)
    assert [traces.note_store(5) for _ in range(3)] == [1, 2, 3]
    traces.register(5, 0, 0)
    assert traces.note_store(5) == 1


@pytest.mark.shows("V6")
def test_a_trace_removed_and_placed_again_starts_anew() -> None:
    traces = WriteTraces(Matrix(1))
    traces.place(5)
    traces.register(5, 0, 0)
    traces.remove(5)
    assert 5 not in traces
    traces.place(5)
    assert (traces.consumers(5, 0), traces.n_placed, traces.n_removed) == (0, 2, 1)
    traces.check()


operations = st.lists(
    st.tuples(
        st.sampled_from(["place", "remove", "register", "forget"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 3),
    )
)


@given(operations)
def test_interest_is_a_set_of_table_entry_and_vcpu(
    script: list[tuple[str, int, int, int]],
) -> None:
    traces = WriteTraces(Matrix(4))
    model: dict[int, set[tuple[int, int]]] = {}
    for what, gfn, index, vcpu in script:
        if what == "place" and gfn not in model:
            traces.place(gfn)
            model[gfn] = set()
        elif what == "remove" and gfn in model:
            traces.remove(gfn)
            del model[gfn]
        elif what == "register" and gfn in model:
            traces.register(gfn, index, vcpu)
            model[gfn].add((index, vcpu))
        elif what == "forget":
            traces.forget(gfn, index, vcpu)
            model.get(gfn, set()).discard((index, vcpu))
        traces.check()
        assert [gfn in traces for gfn in range(3)] == [gfn in model for gfn in range(3)]
        for table, interest in model.items():
            for entry in range(3):
                told = {v for v in range(4) if traces.consumers(table, entry) >> v & 1}
                assert told == {v for e, v in interest if e == entry}
