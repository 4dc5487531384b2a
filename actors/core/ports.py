"""What the protocol needs from the memory beside loads and stores.

In one process nothing is needed: exits are atomic. Between processes a fence orders this side's
earlier stores before its later loads, and an exchange or a lock is one indivisible step that fences
too.
"""

from __future__ import annotations

from typing import Final, Protocol

from penumbra.actors.core.words import Words


class Ports(Protocol):
    """The few operations on shared words that a plain load or store cannot do."""

    def fence(self) -> None:
        """Order earlier stores before later loads (a store-load fence)."""

    def exchange(self, words: Words, at: int, value: int) -> int:
        """Store `value`, return what was there, as one step."""
        ...

    def add(self, words: Words, at: int, n: int) -> int:
        """Add `n`, return the sum, as one step."""
        ...

    def lock(self, words: Words, at: int) -> None:
        """Wait until the word is 0, then set it to 1, as one step."""

    def unlock(self, words: Words, at: int) -> None:
        """Set the word to 0; earlier stores are visible before it."""


class LocalPorts:
    """Ports for one process in which nothing comes between two lines of an exit."""

    __slots__ = ()

    def fence(self) -> None:
        pass

    def exchange(self, words: Words, at: int, value: int) -> int:
        old = words[at]
        words[at] = value
        return old

    def add(self, words: Words, at: int, n: int) -> int:
        total = words[at] + n
        words[at] = total
        return total

    def lock(self, words: Words, at: int) -> None:
        assert not words[at], "locked in one process: the holder is on this stack"
        words[at] = 1

    def unlock(self, words: Words, at: int) -> None:
        words[at] = 0


LOCAL: Final[Ports] = LocalPorts()
