"""A `.trace` file gives back what was written, or one clear error: never anything else."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.guest.traces import (
    Call,
    RecordedProcess,
    Recording,
    TraceError,
    read_recording,
    write_recording,
)
from penumbra.guest.traces.container import (
    _PRELUDE,
    MAGIC,
    VERSION,
    _digest,
    decode_recording,
    encode_recording,
)
from penumbra.guest.traces.images import with_images
from penumbra.hw.streams import MAX_COUNT, AccessStream, pack_runs

PAGE = 4096
pages = st.integers(0, (1 << 20) - 1)


@st.composite
def streams(draw: st.DrawFn, salt: int) -> AccessStream:
    vpns = draw(st.lists(pages, max_size=5, unique=True))
    index = st.integers(0, len(vpns) - 1) if vpns else st.nothing()
    count = st.one_of(st.integers(1, 300), st.just(MAX_COUNT))
    rows = draw(st.lists(st.tuples(index, st.integers(0, 2), count, st.integers(0, 4095))))
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return AccessStream(np.array(vpns, np.int64), pack_runs(*columns), salt)


def memory_calls() -> st.SearchStrategy[tuple[str, tuple[int, ...], int]]:
    address, length = pages.map(lambda vpn: vpn * PAGE), st.integers(1, 9).map(lambda n: n * PAGE)
    number, file_id = st.integers(0, 7), st.integers(-1, 3)
    zero = st.just(0)
    return st.one_of(
        st.tuples(
            st.just("mmap"), st.tuples(address, length, number, number, file_id, number), address
        ),
        st.tuples(st.just("munmap"), st.tuples(address, length), zero),
        st.tuples(st.just("mprotect"), st.tuples(address, length, number), zero),
        st.tuples(st.just("mremap"), st.tuples(address, length, length, number), address),
        st.tuples(st.just("brk"), st.tuples(address), address),
        st.tuples(st.just("exit"), st.tuples(number), zero),
        st.tuples(st.just("other"), st.tuples(st.integers(0, 500)), st.integers(-200, 0)),
    )


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    n_processes = draw(st.integers(1, 3))
    parents = [-1] + [draw(st.integers(0, i)) for i in range(n_processes - 1)]
    processes = []
    for index, parent in enumerate(parents):
        stream = draw(streams(index + 1))
        made = draw(st.lists(memory_calls(), max_size=6))
        children = [child for child in range(n_processes) if parents[child] == index]
        made += [("fork", (child,), child) for child in children]
        made += [("wait", (child,), child) for child in children if draw(st.booleans())]
        places = sorted(draw(st.integers(0, len(stream.runs))) for _ in made)
        calls = tuple(Call(at, *call) for at, call in zip(places, made, strict=True))
        is_own = parent < 0 or draw(st.booleans())
        processes.append(RecordedProcess(index, parent, is_own, stream, calls))
    bits = draw(st.sampled_from((32, 64)))
    recording = with_images(processes, bits, draw(st.text(max_size=20)))
    recording.check()
    return recording


@pytest.fixture(scope="module")
def example() -> Recording:
    """Two processes with all kinds of calls."""
    stream = AccessStream(
        np.array([8, 3, 500], np.int64),
        pack_runs(*(np.array(column, np.int64) for column in
                    ([0, 1, 2, 0], [2, 0, 1, 2], [7, 1, 1000, 2], [16, 0, 4088, 20]))),
        1,
    )  # fmt: skip
    first = RecordedProcess(
        0, -1, True, stream,
        (
            Call(0, "brk", (0,), 5 * PAGE), Call(1, "mmap", (0, PAGE, 3, 2, 0, 7), 500 * PAGE),
            Call(2, "fork", (1,), 1), Call(3, "wait", (1,), 1), Call(4, "exit", (0,)),
        ),
    )  # fmt: skip
    second = RecordedProcess(1, 0, False, replace(stream, salt=2), (Call(4, "exit", (3,)),))
    return with_images((first, second), 32, "made by a test")


@settings(deadline=None)
@given(recordings())
def test_what_was_written_is_read_back(recording: Recording) -> None:
    again = decode_recording(encode_recording(recording), "memory")
    assert again == recording
    assert again.peak_pages == recording.peak_pages


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_holds_the_same(
    example: Recording, data: st.DataObject
) -> None:
    octets = bytearray(encode_recording(example))
    for _ in range(data.draw(st.integers(1, 3))):
        octets[data.draw(st.integers(0, len(octets) - 1))] ^= data.draw(st.integers(0, 255))
    octets = octets[: data.draw(st.integers(0, len(octets)))] + data.draw(st.binary(max_size=3))
    with suppress(TraceError):
        assert decode_recording(bytes(octets), "x") == example


@settings(deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_are_refused(octets: bytes, has_magic: bool) -> None:
    with pytest.raises(TraceError):
        decode_recording((MAGIC if has_magic else b"") + octets, "x")


def test_a_file_cut_anywhere_is_refused(example: Recording) -> None:
    octets = encode_recording(example)
    for length in range(len(octets)):
        with pytest.raises(TraceError):
            decode_recording(octets[:length], "x")


def header_of(octets: bytes) -> dict[str, Any]:
    length = _PRELUDE.unpack_from(octets)[2]
    return msgspec.msgpack.decode(
        octets[_PRELUDE.size : _PRELUDE.size + length], type=dict[str, Any]
    )


def test_damage_inside_a_section_is_named_by_process_section_and_byte(example: Recording) -> None:
    octets = encode_recording(example)
    at = _PRELUDE.size + _PRELUDE.unpack_from(octets)[2]
    for index, (_, _, sections) in enumerate(header_of(octets)["processes"]):
        for name, _, planes in sections:
            for stored, _ in planes:
                damaged = bytearray(octets)
                damaged[at] ^= 1
                with pytest.raises(TraceError) as caught:
                    decode_recording(bytes(damaged), "file")
                assert str(caught.value) == f"file: process {index}, {name}, byte {at}: damaged"
                at += stored
    assert at == len(octets) - 16


def resealed(
    octets: bytes, change: Callable[[dict[str, Any]], object], blocks: bytes = b""
) -> bytes:
    """The file with its header changed and every checksum right again."""
    header = header_of(octets)
    end = _PRELUDE.size + _PRELUDE.unpack_from(octets)[2]
    change(header)
    encoded = msgspec.msgpack.encode(header)
    prelude = _PRELUDE.pack(MAGIC, VERSION, len(encoded), zlib.crc32(encoded))
    body = prelude + encoded + (blocks or octets[end:-16])
    return body + _digest(body)


def section(header: dict[str, Any], place: int) -> Any:
    return header["processes"][0][2][place]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda h: h.update(bits="many"), "Expected `int`"),
        (lambda h: h.update(bits=16), "contents: 16 bits"),
        (lambda h: h.update(processes=[]), "whole file: .* bytes long, not"),
        (lambda h: h["processes"][0].__setitem__(0, 5), "contents: process 0 is numbered"),
        (
            lambda h: h["processes"][1].__setitem__(0, -1),
            "contents: process 0 forks or awaits 1, which is not",
        ),
        (lambda h: section(h, 0).__setitem__(0, "sheep"), "not the sections of this version"),
        (lambda h: section(h, 0).__setitem__(1, 2), "pages, byte .* does not unpack to 2 bytes"),
        (lambda h: section(h, 0).__setitem__(1, 1 << 60), "items cannot be in blocks of"),
        (lambda h: section(h, 0).__setitem__(1, -1), "-1 items cannot be in blocks of"),
        (lambda h: section(h, 1).__setitem__(2, []), "4 items cannot be in blocks of"),
        (lambda h: section(h, 1)[2][0].__setitem__(0, -5), "items cannot be in blocks of"),
    ],
)
def test_a_hostile_header_with_right_checksums_is_refused(
    example: Recording, change: Callable[[dict[str, Any]], object], cause: str
) -> None:
    with pytest.raises(TraceError, match=cause):
        decode_recording(resealed(encode_recording(example), change), "file")


def with_block(example: Recording, place: int, plane: bytes, n_items: int) -> bytes:
    """The file with one section of process 0 replaced by a single plane."""
    octets = encode_recording(example)
    at = _PRELUDE.size + _PRELUDE.unpack_from(octets)[2]
    sections = [s for process in header_of(octets)["processes"] for s in process[2]]
    before = sum(stored for s in sections[:place] for stored, _ in s[2])
    size = sum(stored for stored, _ in sections[place][2])
    packed = zlib.compress(plane, 9)
    blocks = octets[at : at + before] + packed + octets[at + before + size : -16]

    def change(header: dict[str, Any]) -> None:
        section(header, place)[1:] = [n_items, [[len(packed), zlib.crc32(packed)]]]

    return resealed(octets, change, blocks)


@pytest.mark.parametrize(
    ("place", "plane", "cause"),
    [
        (1, bytes([9, 0, 0, 0]), "a run's page is not listed"),
        (2, bytes([3, 0, 0, 0]), "a run of no known kind"),
        (2, bytes([4, 0, 0, 0]), r"a number outside 0 .. 3"),
        (3, bytes([0, 1, 1, 1]), "a run without references"),
        (3, bytes([1, 1, 1]), "columns of different lengths"),
        (0, bytes([2, 0, 2]), "a page is listed twice"),
        (0, bytes([3, 0, 0]), "a page outside a 32-bit address space"),
        (5, b"\xc1", "process 0, calls: "),
        (5, msgspec.msgpack.encode([[0, "format", [], 0]]), "is named 'format'"),
        (5, msgspec.msgpack.encode([[0, "brk", [], 0]]), "brk, has 0 arguments"),
        (5, msgspec.msgpack.encode([[9, "exec", [], 0]]), "out of place at run 9"),
        (5, msgspec.msgpack.encode([[0, "munmap", [5, PAGE], 0]]), "0x5 is no page-aligned"),
        (5, msgspec.msgpack.encode([[0, "brk", [0], -5]]), "a break of -0x5"),
        (5, msgspec.msgpack.encode([[0, "fork", [2], 2]]), "forks or awaits 2"),
        (5, msgspec.msgpack.encode([]), "forked exactly once"),
    ],
)
def test_contents_that_break_an_invariant_are_refused(
    example: Recording, place: int, plane: bytes, cause: str
) -> None:
    with pytest.raises(TraceError, match=cause):
        decode_recording(with_block(example, place, plane, len(plane)), "file")


def test_a_small_file_cannot_ask_for_more_memory_than_allowed(example: Recording) -> None:
    bomb = with_block(example, 3, bytes(1 << 20), 1 << 20)
    with pytest.raises(TraceError, match="bytes of columns, allowed 1000000"):
        decode_recording(bomb, "file", max_bytes=1_000_000)
    with pytest.raises(TraceError, match="more than 10 bytes"):
        decode_recording(bomb, "file", max_bytes=10)


def test_another_version_and_another_kind_of_file_are_named(example: Recording) -> None:
    octets = bytearray(encode_recording(example))
    struct.pack_into("<I", octets, 8, 7)
    with pytest.raises(TraceError, match="prelude: format version 7, this reads 1"):
        decode_recording(bytes(octets), "file")
    with pytest.raises(TraceError, match=r"magic: not a \.trace file"):
        decode_recording(b"PK\x03\x04 and so on", "file")
    with pytest.raises(TraceError, match=r"magic: not a \.trace file"):
        decode_recording(b"", "file")


def test_a_write_never_replaces_unasked_and_leaves_nothing_else_behind(
    example: Recording, tmp_path: Path
) -> None:
    path = tmp_path / "out.trace"
    write_recording(example, path)
    assert read_recording(path) == example
    before = path.read_bytes()
    other = replace(example, provenance="another")
    with pytest.raises(TraceError, match="exists already"):
        write_recording(other, path)
    assert path.read_bytes() == before
    write_recording(other, path, overwrite=True)
    assert read_recording(path) == other
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_opened_or_written_is_one_error(example: Recording, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="open: No such file"):
        read_recording(tmp_path / "absent.trace")
    with pytest.raises(TraceError, match="open: Is a directory"):
        read_recording(tmp_path)
    with pytest.raises(TraceError, match="write: No such file"):
        write_recording(example, tmp_path / "absent" / "out.trace")
