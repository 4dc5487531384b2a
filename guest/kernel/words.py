"""The kernel's data in guest memory: words handed out from pool frames, and spin locks on them.

What a lock guards lives beside it in Python: code between two awaits is atomic, what spans an await
is guarded by a lock. Nothing may be concluded about another CPU from a value that was loaded
without the lock that guards it, because other CPUs run between a load and the code after it.

Lock order: futex, address space, shootdown. Nobody sleeps with a lock held. Whoever waits for a
lock has interrupts enabled meanwhile, and so serves shootdowns: a holder may wait for his answer.
"""

from __future__ import annotations

from penumbra.guest.kernel.frames import TablePool
from penumbra.guest.kernel.layout import Layout
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Exchange, SetInterrupts, SpinUntil, Store

WORD_BYTES = 8


class Words:
    """Hands out 8-byte words, zero, each at a kernel address that never moves."""

    def __init__(self, pool: TablePool, layout: Layout) -> None:
        self._pool = pool
        self._layout = layout
        self._free: list[int] = []

    def take(self) -> int:
        """Return the address of a free word.

        Raises:
            OutOfMemory: The pool is exhausted.
        """
        if not self._free:
            base = self._layout.direct(self._pool.take())
            self._free = list(range(base + PAGE_BYTES - WORD_BYTES, base - 1, -WORD_BYTES))
        return self._free.pop()

    def take_run(self, n: int) -> int:
        """Return the address of `n` consecutive words in one page (at boot, from a fresh page)."""
        first = self.take()
        for expected in range(1, n):
            assert self.take() == first + expected * WORD_BYTES
        return first

    def drop(self, gva: int) -> None:
        """Give a word back; it must be zero (a lock: released)."""
        self._free.append(gva)


async def acquire(lock: int) -> None:
    """Take the spin lock at `lock`, taking interrupts while it is another's."""
    while await Exchange(lock, WORD_BYTES, 1):
        was_enabled = await SetInterrupts(True)
        await SpinUntil(lock, WORD_BYTES, 1, 0)
        if not was_enabled:
            await SetInterrupts(False)


async def release(lock: int) -> None:
    await Store(lock, WORD_BYTES, 0)
