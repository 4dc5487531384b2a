"""Guest programs that use the device window; what they read they leave in memory for the digest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from small_programs import Body, SmallProgram, map_pages

from penumbra.guest.kernel.device_calls import DEVICE_FILE
from penumbra.guest.workloads.verify import ARENA_AT, FIXED, RW, SHARED_AT
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, Mark, Operation, Store, Syscall

WINDOW_AT = ARENA_AT + (16 << 12)
MAP_SHARED = 1


async def map_window(gva: int = WINDOW_AT, prot: int = RW) -> int:
    """Map the window at an address; return what mmap returns."""
    args = (gva, PAGE_BYTES, prot, MAP_SHARED | FIXED, DEVICE_FILE, 0)
    mapped: int = await Syscall("mmap", args)
    return mapped


async def put(text: str) -> None:
    """Put text out by byte stores."""
    for byte in text.encode():
        await Store(WINDOW_AT + 0x400, 1, byte)


async def keep(slot: int, value: int) -> None:
    """Leave a value where the process's digest covers it, and in the run's marks."""
    await Store(SHARED_AT + 8 * slot, 8, value)
    await Mark("read", (slot, value))


def program(name: str, *bodies: Body) -> SmallProgram:
    """Return a program whose first entry finds the window and a page for `keep` mapped."""
    first = bodies[0]

    async def main() -> None:
        await map_pages(SHARED_AT, 1)
        assert await map_window() == WINDOW_AT
        await first()

    return SmallProgram(name, (main, *bodies[1:]))


def doing(*operations: Operation) -> SmallProgram:
    """Return a program that does these and keeps what each gave."""

    async def main() -> None:
        for slot, operation in enumerate(operations):
            value: Any = await operation
            await keep(slot, value or 0)

    return program("doing", main)


async def load(offset: int, size: int = 8) -> int:
    value: int = await Load(WINDOW_AT + offset, size)
    return value


async def store(offset: int, value: int, size: int = 8) -> None:
    await Store(WINDOW_AT + offset, size, value)


def kept(summary: dict[str, Any]) -> Sequence[int]:
    """Return what the program kept, by slot."""
    slots = {args[0]: args[1] for what, args, _ in summary["marks"] if what == "read"}
    return [slots[slot] for slot in sorted(slots)]
