"""Bytes depend on content alone."""

from __future__ import annotations

import json
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.actors.observe import (
    EventKind,
    EventLog,
    canonical_json,
    digest,
    toml_text,
    write_npz,
)

_SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
_TABLES: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), _SCALARS, max_size=3),
    lambda inner: st.dictionaries(
        st.text("abc-_ .é", max_size=4),
        st.one_of(_SCALARS, st.lists(_SCALARS, max_size=3), inner),
        max_size=4,
    ),
    max_leaves=6,
)


@given(_TABLES)
def test_what_is_written_as_toml_reads_back_equal(tables: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(tables)) == tables


def test_a_value_that_is_none_is_left_out_of_toml() -> None:
    assert toml_text({"a": None, "b": {"c": None, "d": 1}}) == "[b]\nd = 1\n"


def test_json_has_one_form_whatever_the_order_and_the_kind_of_number() -> None:
    class Pair(msgspec.Struct):
        b: int
        a: str

    one = {"z": np.int64(1), "a": np.array([1, 2]), "p": Pair(1, "é"), "f": 0.1 + 0.2}
    other = {"f": 0.30000000000000004, "p": {"a": "é", "b": 1}, "a": [1, 2], "z": 1}
    assert canonical_json(one) == canonical_json(other)
    assert canonical_json(other).endswith(b"}\n")
    assert json.loads(canonical_json(one)) == other
    assert digest(one) == digest(other) != digest({})


def test_json_refuses_what_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))
    with pytest.raises(TypeError, match="set in a summary"):
        canonical_json({1})


def test_columns_become_the_same_bytes_at_any_time_and_numpy_reads_them(tmp_path: Path) -> None:
    log = EventLog()
    for progress in range(100):
        log.add(progress, 2 * progress, 0, 1, 1, EventKind.SYSCALL, gva=progress << 12)
    columns = log.columns()
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    write_npz(first, columns)
    write_npz(second, {name: column.copy() for name, column in columns.items()})
    assert first.read_bytes() == second.read_bytes()
    with np.load(first) as read:
        assert list(read) == list(columns)
        for name, column in columns.items():
            assert read[name].tolist() == column.tolist()
            assert read[name].dtype == column.dtype
    with zipfile.ZipFile(first) as archive:
        entries = [(e.date_time, e.compress_type, e.create_system) for e in archive.infolist()]
    assert set(entries) == {((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED, 3)}
