"""Access streams: what packs comes back, and a broken one is named before an engine meets it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.hw.streams import MAX_COUNT, MAX_PAGES, MAX_SALT, MAX_VPN, AccessStream, pack_runs

runs_of = st.lists(
    st.tuples(
        st.integers(0, MAX_PAGES - 1), st.integers(0, 2), st.integers(1, MAX_COUNT),
        st.integers(0, 4095),
    )
)  # fmt: skip


def column(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


def one_run(page: int = 0, kind: int = 0, count: int = 1, offset: int = 0) -> Any:
    return pack_runs(column(page), column(kind), column(count), column(offset))


@given(runs=runs_of)
def test_a_packed_run_holds_its_four_columns_at_the_bits_named(
    runs: list[tuple[int, int, int, int]],
) -> None:
    columns = np.array(runs, np.int64).reshape(-1, 4)
    packed = pack_runs(*columns.T)
    assert packed.dtype == np.int64
    assert [
        (word >> 40, word & 3, word >> 14 & MAX_COUNT, word >> 2 & 4095) for word in packed.tolist()
    ] == runs
    stream = AccessStream(column(), packed, 1)
    assert stream.n_references == sum(count for _, _, count, _ in runs)


@pytest.mark.parametrize(
    ("pages", "runs", "salt", "problem"),
    [
        (column(1, 2), one_run(1), 1, None),
        (column(), column(), 0, None),
        (column(MAX_VPN - 1), one_run(), MAX_SALT - 1, None),
        (column(1, 2), one_run(2), 1, "a run's page is not listed"),
        (column(), one_run(), 1, "a run's page is not listed"),
        (column(1), column(-1), 1, "a run's page is not listed"),
        (column(1), one_run(kind=3), 1, "a run of no known kind"),
        (column(1), one_run(count=0), 1, "a run without references"),
        (column(7, 7), one_run(), 1, "a page is listed twice"),
        (column(-1), one_run(), 1, "a page number that no address has"),
        (column(1, MAX_VPN), one_run(), 1, "a page number that no address has"),
        (column(1), one_run(), -1, "salt -1"),
        (column(1), one_run(), MAX_SALT, f"salt {MAX_SALT}"),
        (column(1).astype(np.uint64), one_run(), 1, "columns are not int64"),
        (column(1), one_run().astype(np.int32), 1, "columns are not int64"),
        (np.zeros(MAX_PAGES + 1, np.int64), column(), 1, f"{MAX_PAGES + 1} pages"),
    ],
)
def test_a_stream_names_its_first_broken_invariant(
    pages: Any, runs: Any, salt: int, problem: str | None
) -> None:
    stream = AccessStream(pages, runs, salt)
    assert stream.problem() == problem
    if problem is None:
        stream.check()
    else:
        with pytest.raises(AssertionError, match=problem):
            stream.check()


def test_streams_are_equal_by_content_and_have_no_hash() -> None:
    stream = AccessStream(column(1), one_run(), 1)
    assert stream == AccessStream(column(1), one_run(), 1)
    different: list[object] = [
        AccessStream(column(2), one_run(), 1), AccessStream(column(1), one_run(count=2), 1),
        AccessStream(column(1), one_run(), 2), "a stream",
    ]  # fmt: skip
    assert all(stream != other for other in different)
    with pytest.raises(TypeError, match="unhashable"):
        hash(stream)
