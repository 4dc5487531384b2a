"""One copy derived from a primary entry and shared by several consumers.

A shadow page table used by several processors is secondary data of each of them. Channels stay one
per pair, but an install may now overwrite a newer one: every write of a copy, from reading the
primary entry to the install, is under the copy's lock, invalidations and shootdown handlers
included. Nobody waits for an acknowledgement with the lock held. With atomic exits the lock is
never contended and costs two words.

One copy for several consumers needs more than the text says: `docs/errata.md` EP13, EP16.

Source: A40c 62, 68, 74.
"""

from __future__ import annotations

from collections.abc import Callable

from penumbra.actors.core.order import Order
from penumbra.actors.core.ports import LOCAL, Ports
from penumbra.actors.core.words import Words


class SharedCopy:
    """A secondary entry in shared words: its lock, then its value; 0 = invalid.

    Invariant: with the lock free, the value is 0 or was derived from a primary entry read after the
    previous value was installed.
    """

    def __init__(
        self, words: Words, at: int, *, ports: Ports = LOCAL, order: Order = Order.CORRECT
    ) -> None:
        self._words = words
        self._lock = at
        self._value = at + 1
        self._ports = ports
        self._locks = not order & Order.NO_ENTRY_LOCK

    @property
    def value(self) -> int:
        return self._words[self._value]

    def refresh(self, derive: Callable[[], int]) -> None:
        """Install what `derive` returns; it reads the primary entry itself, under the lock."""
        if self._locks:
            self._ports.lock(self._words, self._lock)
        self._words[self._value] = derive()
        if self._locks:
            self._ports.unlock(self._words, self._lock)

    def invalidate(self) -> None:
        """Make the copy invalid."""
        self.refresh(lambda: 0)
