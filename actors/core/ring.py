"""A bounded ring of byte records in shared words: one process writes, another reads.

    word 0   written: records ever written, the writer's own
    word 8   read: records ever read, the reader's own
    word 16  slots: each a word for the length, then the bytes

A record is there when `written` says so; that is the last store of its writer, so a writer killed
in a record has written none. No lock and no fence: each word is stored by one side only, and the
machine shows stores in order (`shared_words.stores_are_ordered`). Either side, made anew, goes on
where its words stand.
"""

from __future__ import annotations

from typing import Final

_WRITTEN: Final = 0
_READ: Final = 8
_FIRST: Final = 16

MAX_RECORD_BYTES: Final = 1 << 16


def ring_words(capacity: int, record_bytes: int) -> int:
    """Return how many words a ring takes.

    Raises:
        ValueError: There is no room for a record, or one might be copied out of order.
    """
    if capacity < 1 or not 1 <= record_bytes <= MAX_RECORD_BYTES:
        raise ValueError(
            f"capacity = {capacity}, record_bytes = {record_bytes}: "
            f"at least 1, a record at most {MAX_RECORD_BYTES} bytes"
        )
    return _FIRST + capacity * _slot_words(record_bytes)


def _slot_words(record_bytes: int) -> int:
    return 1 + -(-record_bytes // 8)


class _Side:
    """Invariant: read <= written <= read + capacity."""

    def __init__(self, words: memoryview[int], capacity: int, record_bytes: int) -> None:
        self._words = words
        self._bytes = words.cast("B")
        self._capacity = capacity
        self._limit = record_bytes
        self._stride = _slot_words(record_bytes)
        self._written = words[_WRITTEN]
        self._read = words[_READ]

    def check(self) -> None:
        words = self._words
        assert words[_READ] <= words[_WRITTEN] <= words[_READ] + self._capacity

    def close(self) -> None:
        self._bytes.release()


class RingWriter(_Side):
    """The one that writes."""

    def offer(self, record: bytes) -> bool:
        """Write one record; False = the ring is full, and nothing was written.

        Raises:
            ValueError: It is longer than a slot.
        """
        n = len(record)
        if n > self._limit:
            raise ValueError(f"a record of {n} bytes: at most {self._limit}")
        written = self._written
        if written - self._read >= self._capacity:
            self._read = self._words[_READ]
            if written - self._read >= self._capacity:
                return False
        at = _FIRST + written % self._capacity * self._stride
        begin = 8 * at + 8
        self._bytes[begin : begin + n] = record
        self._words[at] = n
        self._written = self._words[_WRITTEN] = written + 1
        return True


class RingReader(_Side):
    """The one that reads."""

    def drain(self) -> list[bytes]:
        """Take all records there are, oldest first."""
        words, raw = self._words, self._bytes
        capacity, stride = self._capacity, self._stride
        written = words[_WRITTEN]
        records = []
        for position in range(self._read, written):
            at = _FIRST + position % capacity * stride
            begin = 8 * at + 8
            records.append(raw[begin : begin + words[at]].tobytes())
        self._read = words[_READ] = written
        return records

    @property
    def is_empty(self) -> bool:
        return self._words[_WRITTEN] == self._read
