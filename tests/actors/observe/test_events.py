"""The event log against a plain list of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.actors.observe import COLUMNS, EventKind, EventLog

_U64 = st.integers(0, 2**64 - 1)
_ROWS = st.lists(
    st.tuples(
        _U64, _U64, st.integers(0, 255), st.integers(0, 65535), st.integers(0, 65535),
        st.sampled_from(EventKind), _U64, _U64, _U64, _U64,
    ),
    max_size=20,
)  # fmt: skip


@given(_ROWS)
def test_every_value_comes_back_in_its_column_under_the_number_it_was_given(
    rows: list[tuple[Any, ...]],
) -> None:
    log = EventLog()
    seqs = [log.add(*row) for row in rows]
    log.check()
    columns = log.columns()
    assert {name: column.dtype.str for name, column in columns.items()} == COLUMNS
    found = list(zip(*(column.tolist() for column in columns.values()), strict=True))
    assert found == [(seq, *row) for seq, row in zip(seqs, rows, strict=True)]
    assert seqs == list(range(1, len(rows) + 1))
    assert len(log) == len(rows)


def test_a_log_without_events_has_all_columns_with_no_row() -> None:
    assert {name: len(column) for name, column in EventLog().columns().items()} == dict.fromkeys(
        COLUMNS, 0
    )


def test_later_events_do_not_change_columns_already_taken() -> None:
    log = EventLog()
    log.add(1, 2, 0, 0, 0, EventKind.MARK)
    before = log.columns()
    log.add(3, 4, 0, 0, 0, EventKind.HALT)
    assert before["progress"].tolist() == [1]
    assert log.columns()["progress"].tolist() == [1, 3]


def test_numpy_numbers_are_taken_like_others() -> None:
    log = EventLog()
    log.add(np.int64(5).item(), 6, 0, 1, 2, EventKind.MARK, gva=np.uint64(7))  # type: ignore[arg-type]
    assert log.columns()["gva"].tolist() == [7]


def test_a_negative_value_is_refused() -> None:
    with pytest.raises(OverflowError):
        EventLog().add(-1, 0, 0, 0, 0, EventKind.MARK)


def test_the_kinds_keep_the_numbers_that_stand_in_files() -> None:
    assert [kind.value for kind in EventKind] == list(range(1, len(EventKind) + 1))
    known = (EventKind.GUEST_FAULT, EventKind.PATCH_POSTED, EventKind.WORLD_SWITCH)
    assert known == (1, 5, 26)
