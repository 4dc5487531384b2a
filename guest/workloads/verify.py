"""What the workloads have in common: addresses, patterns, and saying that a value is wrong."""

from __future__ import annotations

from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, Mark, Syscall

# Below 1 GiB, so that the same addresses serve both formats.
SHARED_AT = 0x1000_0000
ARENA_AT = 0x2000_0000
WORD = 8
RW = 3
_M64 = (1 << 64) - 1

PRIVATE_ANONYMOUS = 0x22
SHARED_ANONYMOUS = 0x21
FIXED = 0x10


def pattern(*keys: int) -> int:
    """Return a 64-bit word, never 0, that is another for other keys."""
    x = 0x9E3779B97F4A7C15
    for key in keys:
        x = ((x ^ (key & _M64)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _M64
        x ^= x >> 29
    return x | 1


async def expect(gva: int, wanted: int) -> bool:
    """Load 8 bytes; tell whether they are `wanted`, and report them if not."""
    found: int = await Load(gva, WORD)
    if found == wanted:
        return True
    await Mark("wrong", (gva, wanted, found), "a load returned what was never last stored there")
    return False


async def map_anonymous(gva: int, n_pages: int, flags: int = PRIVATE_ANONYMOUS) -> None:
    """Map fresh zeroed pages at `gva`, over whatever is there, and report it if that fails."""
    args = (gva, n_pages * PAGE_BYTES, RW, flags | FIXED, -1, 0)
    if await Syscall("mmap", args) != gva:
        await Mark("wrong", (gva,), "mmap failed")
