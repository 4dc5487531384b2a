"""The `.trace` file: a recording as one checked, compressed file.

    8 bytes   magic
    3 u32     format version, length of the header, its crc32      (all little-endian)
    header    msgpack: `_Header`
    blocks    zlib streams, back to back, in the header's order
    16 bytes  blake2b of all that precedes

A section is a column of unsigned numbers. It is stored as byte planes, first the lowest byte of
every number, then the next one, only as many as the largest number needs: counts, kinds and page
indices are mostly one plane, and a plane compresses better than the bytes mixed. Each plane is one
block with its own length and crc32, so damage is named by section and place. Nothing is taken from
the file on trust: a length is compared with what is there before memory is asked for, and what was
decoded must satisfy `Recording.problem`. Images and `peak_pages` are derived again, not stored.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from penumbra.guest.traces.errors import TraceError
from penumbra.guest.traces.images import with_images
from penumbra.guest.traces.recording import Call, RecordedProcess, Recording
from penumbra.hw.streams import (
    COUNT_SHIFT,
    MAX_COUNT,
    MAX_PAGES,
    OFFSET_SHIFT,
    PAGE_SHIFT,
    AccessStream,
    pack_runs,
)

MAGIC = b"\x89PTRACE\n"
VERSION = 1
MAX_BYTES = 1 << 30
_PRELUDE = struct.Struct("<8sIII")
_DIGEST_BYTES = 16
_MAX_RATIO = 1032  # no zlib stream unpacks to more than that many times its length
_SECTIONS = ("pages", "run pages", "run kinds", "run counts", "run offsets", "calls")
_LIMITS: dict[str, int] = dict(
    zip(_SECTIONS[1:], (MAX_PAGES, 4, MAX_COUNT + 1, 4096, 256), strict=True)
)
_BYTES_PER_ITEM = dict.fromkeys(_SECTIONS, 8) | {"calls": 48}  # in memory, a generous guess

_T = TypeVar("_T")
_Column = npt.NDArray[np.int64]


class _Block(msgspec.Struct, array_like=True, frozen=True):
    stored: int
    crc: int


class _Section(msgspec.Struct, array_like=True, frozen=True):
    name: str
    n_items: int
    planes: tuple[_Block, ...]


class _Process(msgspec.Struct, array_like=True, frozen=True):
    parent: int
    starts_at_exec: bool
    sections: tuple[_Section, ...]


class _Header(msgspec.Struct, frozen=True):
    bits: int
    provenance: str
    processes: tuple[_Process, ...]


class _Call(msgspec.Struct, array_like=True, frozen=True):
    at: int
    name: str
    args: tuple[int, ...]
    result: int


def write_recording(recording: Recording, path: Path, overwrite: bool = False) -> None:
    """Write a recording; `path` holds all of it or is as it was before.

    Raises:
        TraceError: The file exists and `overwrite` is not asked for, or it cannot be written.
    """
    recording.check()
    refuse_existing(path, overwrite)
    data = encode_recording(recording)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _publish(temporary, path, overwrite)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TraceError(str(path), "write", error.strerror or str(error)) from error


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise unless `path` may be written; for callers with long work before the write."""
    if not overwrite and path.exists():
        raise TraceError(str(path), "write", "exists already and is not overwritten")


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        with suppress(OSError):  # a link refuses an existing name by itself, where there are links
            path.hardlink_to(temporary)
            return
        refuse_existing(path, overwrite)
    temporary.replace(path)


def encode_recording(recording: Recording) -> bytes:
    """Return the file's bytes; equal recordings give equal bytes on one zlib."""
    processes: list[_Process] = []
    blocks: list[bytes] = []
    for process in recording.processes:
        sections: list[_Section] = []
        for name, column in zip(_SECTIONS, _columns(process), strict=True):
            planes = [zlib.compress(plane, 9) for plane in _planes(column)]
            blocks += planes
            entries = tuple(_Block(len(plane), zlib.crc32(plane)) for plane in planes)
            sections.append(_Section(name, len(column), entries))
        processes.append(_Process(process.parent, process.starts_at_exec, tuple(sections)))
    header = msgspec.msgpack.encode(_Header(recording.bits, recording.provenance, tuple(processes)))
    prelude = _PRELUDE.pack(MAGIC, VERSION, len(header), zlib.crc32(header))
    body = b"".join((prelude, header, *blocks))
    return body + _digest(body)


def _columns(process: RecordedProcess) -> Iterator[_Column]:
    """Yield a process's sections in the order of `_SECTIONS`."""
    steps = np.diff(process.stream.pages, prepend=0)
    yield (steps << 1) ^ (steps >> 63)  # small steps either way become small numbers
    runs = process.stream.runs
    yield runs >> PAGE_SHIFT
    yield runs & 3
    yield (runs >> COUNT_SHIFT) & MAX_COUNT
    yield (runs >> OFFSET_SHIFT) & 4095
    calls = [_Call(call.at, call.name, call.args, call.result) for call in process.calls]
    yield np.frombuffer(msgspec.msgpack.encode(calls), np.uint8).astype(np.int64)


def _planes(column: _Column) -> Iterator[bytes]:
    width = max(1, (int(column.max()).bit_length() + 7) // 8) if len(column) else 0
    octets = column.astype("<i8").view(np.uint8).reshape(-1, 8)
    for place in range(width):
        yield octets[:, place].tobytes()


def read_recording(path: Path, max_bytes: int = MAX_BYTES) -> Recording:
    """Read a recording; whatever is wrong with the file ends in one `TraceError`.

    Args:
        path: A `.trace` file.
        max_bytes: Most memory that its columns may take, and most of the file itself.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise TraceError(str(path), "open", error.strerror or str(error)) from error
    return decode_recording(data, str(path), max_bytes)


def decode_recording(data: bytes, name: str, max_bytes: int = MAX_BYTES) -> Recording:
    """Decode a file's bytes; `name` is what errors call the file."""
    return _Reader(data, name, max_bytes).recording()


class _Reader:
    """One pass over a file's bytes; every refusal names the place."""

    def __init__(self, data: bytes, name: str, max_bytes: int) -> None:
        self._data, self._name, self._max_bytes = data, name, max_bytes
        self._at = 0

    def recording(self) -> Recording:
        header = self._header()
        self._check_lengths(header)
        processes = [
            self._process(index, process) for index, process in enumerate(header.processes)
        ]
        if self._data[self._at :] != _digest(self._data[: self._at]):
            raise self._error("checksum", "the file is damaged")
        bare = Recording(tuple(processes), header.bits, header.provenance)
        if (problem := bare.problem()) is not None:
            raise self._error("contents", problem)
        return with_images(processes, header.bits, header.provenance)

    def _header(self) -> _Header:
        data = self._data
        if len(data) > self._max_bytes:
            raise self._error("whole file", f"more than {self._max_bytes} bytes")
        if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
            raise self._error("magic", "not a .trace file")
        if len(data) < _PRELUDE.size:
            raise self._error("prelude", f"cut off at byte {len(data)}")
        _, version, length, crc = _PRELUDE.unpack_from(data)
        if version != VERSION:
            raise self._error("prelude", f"format version {version}, this reads {VERSION}")
        self._at = _PRELUDE.size + length
        if self._at > len(data):
            raise self._error("header", f"cut off at byte {len(data)}")
        encoded = data[_PRELUDE.size : self._at]
        if zlib.crc32(encoded) != crc:
            raise self._error("header", "damaged")
        return self._decoded("header", encoded, _Header)

    def _check_lengths(self, header: _Header) -> None:
        """Compare all that the header promises with the file's length and the memory allowed."""
        n_stored, n_bytes = self._at + _DIGEST_BYTES, 0
        for index, process in enumerate(header.processes):
            if tuple(section.name for section in process.sections) != _SECTIONS:
                raise self._error(f"header, process {index}", "not the sections of this version")
            for section in process.sections:
                stored = [block.stored for block in section.planes]
                largest = min(stored, default=0) * _MAX_RATIO
                if not 0 <= section.n_items <= largest or len(stored) > 8:
                    cause = f"{section.n_items} items cannot be in blocks of {stored} bytes"
                    raise self._error(f"header, process {index}, {section.name}", cause)
                n_stored += sum(stored)
                n_bytes += section.n_items * _BYTES_PER_ITEM[section.name]
        if n_bytes > self._max_bytes:
            raise self._error("header", f"{n_bytes} bytes of columns, allowed {self._max_bytes}")
        if n_stored != len(self._data):
            cause = f"{len(self._data)} bytes long, not {n_stored} as the header says"
            raise self._error("whole file", cause)

    def _process(self, index: int, process: _Process) -> RecordedProcess:
        columns = {
            section.name: self._column(f"process {index}, {section.name}", section)
            for section in process.sections
        }
        page, kind, count, offset = (columns[name] for name in _SECTIONS[1:5])
        if not len(page) == len(kind) == len(count) == len(offset):
            raise self._error(f"process {index}", "columns of different lengths")
        steps = columns["pages"].view(np.uint64)
        pages = np.cumsum((steps >> np.uint64(1)).view(np.int64) ^ -(columns["pages"] & 1))
        encoded = columns["calls"].astype(np.uint8).tobytes()
        calls = self._decoded(f"process {index}, calls", encoded, tuple[_Call, ...])
        return RecordedProcess(
            index,
            process.parent,
            process.starts_at_exec,
            AccessStream(pages, pack_runs(page, kind, count, offset), index + 1),
            tuple(Call(call.at, call.name, call.args, call.result) for call in calls),
        )

    def _column(self, place: str, section: _Section) -> _Column:
        octets = np.zeros((section.n_items, 8), np.uint8)
        for plane, block in enumerate(section.planes):
            octets[:, plane] = self._unpack(place, block, section.n_items)
        column = octets.reshape(-1).view("<i8").astype(np.int64)
        limit = _LIMITS.get(section.name)
        if limit is not None and len(column) and not 0 <= column.min() <= column.max() < limit:
            raise self._error(place, f"a number outside 0 .. {limit - 1}")
        return column

    def _unpack(self, place: str, block: _Block, n_items: int) -> npt.NDArray[np.uint8]:
        place = f"{place}, byte {self._at}"
        stored = self._data[self._at : self._at + block.stored]
        self._at += block.stored
        if zlib.crc32(stored) != block.crc:
            raise self._error(place, "damaged")
        unpacker = zlib.decompressobj()
        try:
            plane = unpacker.decompress(stored, n_items + 1)
        except zlib.error as error:
            raise self._error(place, str(error)) from error
        if len(plane) != n_items or not unpacker.eof or unpacker.unused_data:
            raise self._error(place, f"does not unpack to {n_items} bytes")
        return np.frombuffer(plane, np.uint8)

    def _decoded(self, place: str, encoded: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.msgpack.decode(encoded, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._error(place, str(error)) from error

    def _error(self, place: str, cause: str) -> TraceError:
        return TraceError(self._name, place, cause)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
