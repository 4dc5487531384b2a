"""A block of log text becomes the references it shows, and hands out the rest as text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penumbra.guest.traces import TraceError
from penumbra.guest.traces.compiled import Scan, compiled_scan, scan_for
from penumbra.guest.traces.logtext import MAX_LINE_BYTES, LogBlock, decode, decode_by, read_blocks
from penumbra.guest.traces.scan import scan
from penumbra.hw.streams import FETCH, READ, WRITE

KINDS = {"I ": FETCH, " L": READ, " S": WRITE, " M": WRITE}
Row = tuple[int, int, int]
HAS_NUMBA = importlib.util.find_spec("numba") is not None
LOOPS: dict[str, Scan] = {"interpreted": scan} | (
    {"compiled": compiled_scan()} if HAS_NUMBA else {}
)

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
        "I  01234567,000",
        "I  01234567,012x",
        "I  01234567,-1",
        " I 01234567,4",
        "   01234567,4",
        "I L01234567,4",
        " L 01234567,4 ",
        " L 01234567,4\r",
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


def facts(block: LogBlock) -> tuple[object, ...]:
    """All that a block says, with the widths of its columns."""
    columns = (block.kind, block.address, block.size)
    dtypes = [column.dtype.str for column in columns]
    return dtypes, [column.tolist() for column in columns], block.others, block.n_lines


@pytest.mark.shows("G9")
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@settings(deadline=None)
@given(
    lines=st.lists(
        st.one_of(
            a_reference.map(lambda row: f"{row[0]} {row[1]:08x},{row[2]}".encode()),
            another_line.map(str.encode),
            st.binary(max_size=40).map(lambda noise: noise.replace(b"\n", b" ")),
            # Near misses: of the right letters in the wrong places.
            st.text("IILSM  0123456789abcdefg,,", max_size=30).map(str.encode),
        ),
        min_size=1,
    )
)
def test_the_byte_loop_and_numpy_read_the_same_from_any_lines(
    loop: Scan, lines: list[bytes]
) -> None:
    text = b"\n".join([*lines, b""])
    assert facts(decode_by(loop, text, 7)) == facts(decode(text, 7))


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@settings(deadline=None)
@given(row=a_reference, place=st.integers(0, 40), wrong=st.integers(0, 255))
def test_one_wrong_byte_in_a_reference_is_judged_alike(
    loop: Scan, row: tuple[str, int, int], place: int, wrong: int
) -> None:
    line = bytearray(f"{row[0]} {row[1]:08x},{row[2]}\n".encode())
    line[place % (len(line) - 1)] = wrong
    text = bytes(line) * 2
    assert facts(decode_by(loop, text, 1)) == facts(decode(text, 1))


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_more_other_lines_than_the_byte_loop_notes_at_once_are_all_handed_out(loop: Scan) -> None:
    text = b"".join(b"== %d ==\n L 04000000,8\n" % number for number in range(10_000))
    block = decode_by(loop, text, 1)
    assert facts(block) == facts(decode(text, 1))
    assert (len(block.others), len(block.kind), block.n_lines) == (10_000, 10_000, 20_000)


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_a_long_text_is_compiled_for_and_the_environment_may_forbid_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENUMBRA_ENGINE", "numba")
    assert scan_for(1 << 30, 1 << 20) is compiled_scan()
    assert scan_for(1, 1 << 20) is compiled_scan()  # here already, so there is nothing to save
    monkeypatch.setenv("PENUMBRA_ENGINE", "plain")
    assert scan_for(1 << 30, 1 << 20) is None
