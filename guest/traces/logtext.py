"""Bytes of a lackey log to columns of references, a block of lines at a time.

A reference line is `I  addr,size`, ` L addr,size`, ` S addr,size` or ` M addr,size`: three
characters, 8 to 16 hex digits, a comma, 1 to 3 decimal digits, not all zero. What is not such a
line is handed out as text.

There are two decoders with the same results. Where numba is installed, `scan` is a compiled loop
over the bytes. Where it is not, numpy decodes every line of a block at once: the eight bytes before
the comma are one unaligned 64-bit word, and its digits are turned into a number by arithmetic on
the whole word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penumbra.guest.traces.compiled import Scan, scan_for
from penumbra.guest.traces.errors import TraceError as TraceError
from penumbra.guest.traces.scan import AT, LINES, N_STATE, OTHERS, REFERENCES
from penumbra.hw.streams import FETCH, READ, WRITE

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 1 << 20
WORTH_COMPILING_BYTES = 2 << 20
_MARGIN = 16  # bytes before and after the text, so that wide loads stay inside the buffer
_PREFIXES = ((b"I  ", FETCH), (b" L ", READ), (b" S ", WRITE), (b" M ", WRITE))
_SHORTEST = len("I  01234567,1")
_OTHERS_AT_ONCE = 4096


@dataclass(frozen=True)
class LogBlock:
    """Consecutive lines of one log.

    Attributes:
        kind: uint8[n] of `READ`, `WRITE`, `FETCH`; a modify is a write.
        address: uint64[n], first byte of the reference.
        size: int64[n], 1 to 999.
        others: All other lines: line number from 1, references of this block before it, text.
        n_lines: Lines of both sorts.
    """

    kind: npt.NDArray[np.uint8]
    address: npt.NDArray[np.uint64]
    size: npt.NDArray[np.int64]
    others: list[tuple[int, int, bytes]]
    n_lines: int


def read_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[LogBlock]:
    """Read a log in blocks of whole lines.

    A last line without its newline is left out: a killed process leaves one, and half an address
    is a wrong address.

    Raises:
        TraceError: The file cannot be read, or a line is longer than any log's.
    """
    first_line, rest = 1, b""
    try:
        with path.open("rb") as file:
            while chunk := file.read(block_bytes):
                text = rest + chunk
                cut = text.rfind(b"\n") + 1
                rest = text[cut:]
                if len(rest) > MAX_LINE_BYTES:
                    raise TraceError(str(path), f"after line {first_line}", "not lines of text")
                if cut:
                    scan = scan_for(cut, WORTH_COMPILING_BYTES)
                    whole = memoryview(text)[:cut]
                    block = (
                        decode(whole, first_line)
                        if scan is None
                        else decode_by(scan, whole, first_line)
                    )
                    yield block
                    first_line += block.n_lines
    except OSError as error:
        raise TraceError(str(path), "open", error.strerror or str(error)) from error


def decode_by(scan: Scan, text: bytes | memoryview, first_line: int) -> LogBlock:
    """Decode whole lines with the byte loop, compiled or not."""
    buffer = np.frombuffer(text, np.uint8)
    most = len(buffer) // (_SHORTEST + 1)
    kind, address, size = np.empty(most, np.uint8), np.empty(most, np.uint64), np.empty(most, int)
    bounds = np.empty((_OTHERS_AT_ONCE, 4), np.int64)
    state = np.zeros(N_STATE, np.int64)
    others: list[tuple[int, int, bytes]] = []
    while state[AT] < len(buffer):
        state[OTHERS] = 0
        scan(buffer, _DIGITS, _KIND_BY_LETTER, kind, address, size, bounds, state)
        others += [
            (first_line + line, before, bytes(text[start:end]))
            for start, end, line, before in bounds[: state[OTHERS]].tolist()
        ]
    n = int(state[REFERENCES])
    return LogBlock(kind[:n], address[:n], size[:n], others, int(state[LINES]))


def _table(value_by_letter: dict[int, int], other: int, dtype: type[np.generic]) -> Any:
    table = np.full(256, other, dtype)
    for letter, value in value_by_letter.items():
        table[letter] = value
    return table


_DIGITS = _table({ord(f"{value:x}"): value for value in range(16)}, 16, np.uint64)
_KIND_BY_LETTER = _table({prefix.strip()[0]: kind for prefix, kind in _PREFIXES}, 255, np.uint8)


def decode(text: bytes | memoryview, first_line: int) -> LogBlock:
    """Decode whole lines with numpy alone."""
    pad = b" " * _MARGIN
    buffer = np.frombuffer(b"".join((pad, text, pad)), np.uint8)
    ends = np.flatnonzero(buffer == ord("\n"))
    starts = np.concatenate(([_MARGIN], ends[:-1] + 1))
    kinds = _kinds(buffer, starts)
    candidate = np.flatnonzero((kinds != 255) & (ends - starts >= _SHORTEST))
    size, comma = _sizes(buffer, ends[candidate])
    address, is_address = _addresses(buffer, comma, comma - starts[candidate] - 3)
    good = is_address & (size > 0)
    is_reference = np.zeros(len(ends), bool)
    is_reference[candidate[good]] = True
    others = [
        (first_line + line, line - rank, bytes(buffer[starts[line] : ends[line]]))
        for rank, line in enumerate(np.flatnonzero(~is_reference).tolist())
    ]
    return LogBlock(kinds[candidate[good]], address[good], size[good], others, len(ends))


def _words(buffer: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.unsignedinteger]:
    """View the buffer as one little-endian word of `width` bytes at every byte offset."""
    return np.ndarray((len(buffer) - width + 1,), f"<u{width}", buffer, 0, (1,))


def _kinds(buffer: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    head = _words(buffer, 4)[starts] & 0xFFFFFF
    kinds = np.full(len(starts), 255, np.uint8)
    for prefix, kind in _PREFIXES:
        kinds[head == int.from_bytes(prefix, "little")] = kind
    return kinds


def _sizes(
    buffer: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Read the decimal number before each end; 0 where there is none. Also the comma's place."""
    tail = _words(buffer, 4)[ends - 4]
    last, second, third, fourth = (
        ((tail >> np.uint32(shift)) & np.uint32(0xFF)).astype(np.uint8) for shift in (24, 16, 8, 0)
    )
    digit_1, digit_2, digit_3 = (char - np.uint8(ord("0")) for char in (last, second, third))
    comma = np.uint8(ord(","))
    size = digit_1.astype(np.int64)
    valid = digit_1 <= 9
    n_digits = np.ones(len(ends), np.int64)
    longer = np.flatnonzero(second != comma)  # a reference of ten bytes or more is rare
    is_two = third[longer] == comma
    n_digits[longer] = 3 - is_two
    size[longer] += digit_2[longer] * np.int64(10)
    size[longer] += np.where(is_two, 0, digit_3[longer] * np.int64(100))
    valid[longer] &= digit_2[longer] <= 9
    valid[longer] &= is_two | ((digit_3[longer] <= 9) & (fourth[longer] == comma))
    return np.where(valid, size, 0), ends - 1 - n_digits


def _addresses(
    buffer: npt.NDArray[np.uint8], comma: npt.NDArray[np.int64], n_digits: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    words = _words(buffer, 8)
    address, valid = _hex_value(words[comma - 8].byteswap())
    valid &= (n_digits >= 8) & (n_digits <= 16)
    long = np.flatnonzero(valid & (n_digits > 8))
    if len(long):
        high = words[comma[long] - 16].byteswap()
        keep = (np.uint64(1) << (8 * (n_digits[long] - 8) % 64).astype(np.uint64)) - np.uint64(1)
        keep[n_digits[long] == 16] = np.uint64(0xFFFFFFFFFFFFFFFF)
        value, is_hex = _hex_value((high & keep) | (np.uint64(0x3030303030303030) & ~keep))
        address[long] |= value << np.uint64(32)
        valid[long] &= is_hex
    return address, valid


def _hex_value(
    chars: npt.NDArray[np.uint64],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Turn eight hex digits per word, most significant in the top byte, into a number.

    The digits are checked by encoding them again: `0-9a-f` come back as they were, nothing else.
    """
    ones = np.uint64(0x0101010101010101)
    value = (chars & (ones * np.uint64(15))) + ((chars >> np.uint64(6)) & ones) * np.uint64(9)
    letters = ((value + ones * np.uint64(6)) >> np.uint64(4)) & ones
    again = value + ones * np.uint64(0x30) + letters * np.uint64(0x27)
    valid = (again == chars) & ((value & (ones * np.uint64(0xF0))) == 0)
    for shift, mask in (
        (4, 0x00FF00FF00FF00FF),
        (8, 0x0000FFFF0000FFFF),
        (16, 0x00000000FFFFFFFF),
    ):
        value = (value | (value >> np.uint64(shift))) & np.uint64(mask)
    return value, valid
