"""The words of a matrix in memory that several processes share, and what plain Python can order.

A store of one aligned 64-bit word through a memoryview is one store of the machine, and x86 makes
stores visible in program order. So the default form between processes is the one that needs no
more than that, `UNFENCED`: no coalescing, counter bells, a trace placer that asks. It takes no
lock, no fence and no version. `FENCED` coalesces, and pays one fence per store and one per event
that frees.

A fence is the acquisition and release of a lock that nobody else has: an indivisible
read-modify-write, which x86 orders with everything. On machines that order less, `ProcessPorts`
refuses to be made.

Source: A40 ¶98, ¶120; A40c 55, 56.
"""

from __future__ import annotations

import platform
import sys
import threading
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Final

from penumbra.actors.core.order import SWITCHES, Order
from penumbra.actors.core.patch import ProtocolError
from penumbra.actors.core.words import Words

UNFENCED: Final = SWITCHES["no_coalescing"].order
FENCED: Final = Order.CORRECT

_STORES_IN_ORDER: Final = frozenset({"x86_64", "amd64"})
_ATTACH: Final[dict[str, Any]] = {"track": False} if sys.version_info >= (3, 13) else {}


class UnorderedMemory(RuntimeError):
    """Plain stores are not ordered on this machine: nothing was made."""


def stores_are_ordered() -> bool:
    """Say whether other processes see this one's stores whole and in program order."""
    return platform.machine().lower() in _STORES_IN_ORDER and sys.maxsize > 1 << 32


class ProcessPorts:
    """Ports for one of several processes: the fence, and an `add` for one that alone adds.

    What needs an indivisible step on a word that others store to is refused: plain Python has none.
    The forms `UNFENCED` and `FENCED` need none.

    Raises:
        UnorderedMemory: The machine orders too little.
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self) -> None:
        if not stores_are_ordered():
            raise UnorderedMemory(f"stores of plain Python have no order on {platform.machine()}")
        lock = threading.Lock()
        self._acquire, self._release = lock.acquire, lock.release

    def fence(self) -> None:
        self._acquire()
        self._release()

    def exchange(self, words: Words, at: int, value: int) -> int:
        raise ProtocolError("no exchange between processes: bells are counters there")

    def add(self, words: Words, at: int, n: int) -> int:
        """Add; only one process may ever add to this word."""
        words[at] = total = words[at] + n
        self.fence()
        return total

    def lock(self, words: Words, at: int) -> None:
        raise ProtocolError("no lock between processes: a copy belongs to one of them")

    def unlock(self, words: Words, at: int) -> None:
        raise ProtocolError("no lock between processes: a copy belongs to one of them")


class SharedWords:
    """64-bit words, all zero at first, reached by name from any process of this machine.

    Who created them unlinks them at `close`; a process that attached, and one that is killed, never
    does.
    """

    def __init__(self, memory: SharedMemory, n_words: int, *, owned: bool) -> None:
        self._memory = memory
        self._owned = owned
        whole = memory.buf
        assert whole is not None
        self._bytes = whole[: 8 * n_words]
        self.words: memoryview[int] = self._bytes.cast("Q")

    @classmethod
    def create(cls, n_words: int) -> SharedWords:
        if n_words < 1:
            raise ValueError(f"n_words = {n_words}: must be at least 1")
        return cls(SharedMemory(create=True, size=8 * n_words), n_words, owned=True)

    @classmethod
    def attach(cls, name: str, n_words: int) -> SharedWords:
        """Reach words that another process has created.

        Raises:
            FileNotFoundError: There are none of this name, or no more.
            ValueError: They are fewer than `n_words`.
        """
        memory = SharedMemory(name, **_ATTACH)
        if memory.size < 8 * n_words:
            memory.close()
            raise ValueError(f"shared words {name!r}: {memory.size // 8}, not {n_words}")
        return cls(memory, n_words, owned=False)

    @property
    def name(self) -> str:
        return self._memory.name

    def close(self) -> None:
        """Let go of the words; views taken of them must have been released."""
        self.words.release()
        self._bytes.release()
        self._memory.close()
        if self._owned:
            self._owned = False
            self._memory.unlink()
