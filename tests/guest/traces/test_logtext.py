"""A block of log text becomes the references it shows, and hands out the rest as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penumbra.guest.traces import TraceError
from penumbra.guest.traces.logtext import MAX_LINE_BYTES, read_blocks
from penumbra.hw.streams import FETCH, READ, WRITE

KINDS = {"I ": FETCH, " L": READ, " S": WRITE, " M": WRITE}
Row = tuple[int, int, int]

a_reference = st.tuples(
    st.sampled_from(sorted(KINDS)),
    st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)),
    st.integers(1, 999),
)
another_line = st.sampled_from(
    [
        "==12== Command: x",
        "SYSCALL[12,1](12) sys_brk ( 0x0 ) --> [pre-success] Success(0x5000)",
        " --> [pre-success] Success(0x0)",
        "",
        "I  0123456,4",
        "I  012345678",
        "I  01234567,",
        "I  0123456g,4",
        "I  0123456G,4",
        "I  01234567,1000",
        "I  01234567,x4",
        "I  01234567,0",
        "I  00123456789abcdef,4",
        " X 01234567,4",
        "\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9",
    ]
)


def read_all(
    path: Path, block_bytes: int = 1 << 20
) -> tuple[list[Row], list[tuple[int, int, str]]]:
    """All references of a log, and all other lines with their number and references before."""
    rows: list[Row] = []
    others: list[tuple[int, int, str]] = []
    for block in read_blocks(path, block_bytes):
        others += [(line, len(rows) + before, text.decode()) for line, before, text in block.others]
        rows += zip(block.kind.tolist(), block.address.tolist(), block.size.tolist(), strict=True)
    return rows, others


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(st.one_of(a_reference, another_line)), block_bytes=st.integers(1, 200))
def test_every_line_is_a_reference_or_handed_out_in_any_block_size(
    tmp_path: Path, lines: list[tuple[str, int, int] | str], block_bytes: int
) -> None:
    rows: list[Row] = []
    others: list[tuple[int, int, str]] = []
    text = ""
    for number, line in enumerate(lines, 1):
        if isinstance(line, str):
            others.append((number, len(rows), line))
            text += line + "\n"
        else:
            rows.append((KINDS[line[0]], line[1], line[2]))
            text += f"{line[0]} {line[1]:08x},{line[2]}\n"
    path = tmp_path / "log"
    path.write_bytes(text.encode())
    assert read_all(path, block_bytes) == (rows, others)


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("I  04000000,3\n L 1fff0007", newline="\n")
    assert read_all(path) == ([(FETCH, 0x4000000, 3)], [])


def test_a_file_that_is_not_lines_of_text_is_refused_without_reading_it_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(bytes(4 * MAX_LINE_BYTES))
    with pytest.raises(TraceError, match="not lines of text"):
        read_all(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="absent: open: No such file"):
        read_all(tmp_path / "absent")
