"""What threads of one address space agree by: user memory and the futex calls."""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.hw.operations import CompareExchange, Load, Store, Syscall

EVERYBODY = 1 << 16


@dataclass(frozen=True)
class Barrier:
    """A barrier for `n` threads in 8 bytes of zeroed user memory: count, then generation."""

    gva: int
    n: int

    async def wait(self) -> None:
        """Return when all `n` threads have called."""
        generation = await Load(self.gva + 4, 4)
        arrived = await add(self.gva, 1)
        if arrived == self.n:
            # The count first: who leaves with the new generation may come again at once.
            await Store(self.gva, 4, 0)
            await Store(self.gva + 4, 4, (generation + 1) & 0xFFFF_FFFF)
            await Syscall("futex_wake", (self.gva + 4, EVERYBODY))
            return
        while await Load(self.gva + 4, 4) == generation:
            await Syscall("futex_wait", (self.gva + 4, generation))


async def add(gva: int, amount: int) -> int:
    """Add to a 4-byte word atomically and return the sum."""
    old: int = await Load(gva, 4)
    while True:
        new = (old + amount) & 0xFFFF_FFFF
        seen: int = await CompareExchange(gva, 4, old, new)
        if seen == old:
            return new
        old = seen
