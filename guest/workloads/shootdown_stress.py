"""Threads in one address space: one changes mappings while its siblings read and write through
them.

Four protocols run at once, each right only if the kernel's shootdowns are complete when a call
returns:

remap     The owner maps fresh pages over the window, fills them with the round's pattern, and
          publishes the round. A reader that sees the same even sequence word before and after a
          read must have read that round's pattern; a frame kept in some TLB would show an older.
protect   Siblings read pages that the owner protects and unprotects all the time: no change.
scratch   Each sibling owns a page that the owner unmaps only while the sibling is paused; the
          sibling must then find zeros there, not what it wrote before.
snapshot  The owner forks a child that must find this round's pattern and the protected pages, while
          every sibling goes on writing its scratch page, which has become copy-on-write.
"""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.programs.sync import Barrier
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import (
    ARENA_AT,
    FIXED,
    PRIVATE_ANONYMOUS,
    RW,
    SHARED_AT,
    WORD,
    expect,
    pattern,
)
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Load, Mark, Store, Syscall

_MAIN, _SIBLING, _SNAPSHOT = 0, 1, 2
_SEQUENCE = SHARED_AT
_STOP = SHARED_AT + WORD
_PAUSE = SHARED_AT + 2 * WORD
_BARRIER = SHARED_AT + 3 * WORD
_FROZEN_AT = ARENA_AT + 0x100_0000
_SCRATCH_AT = ARENA_AT + 0x200_0000


@dataclass(frozen=True)
class ShootdownStress:
    """`threads` siblings against one owner for `rounds` rounds over windows of `pages` pages."""

    threads: int = 3
    rounds: int = 12
    pages: int = 4

    @property
    def name(self) -> str:
        return "shootdown-stress"

    @property
    def peak_pages(self) -> int:
        return 4 * self.pages + 2 * self.threads + 8

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [
            (SHARED_AT // PAGE_BYTES, 1),
            (ARENA_AT // PAGE_BYTES, self.pages),
            (_FROZEN_AT // PAGE_BYTES, self.pages),
            (_SCRATCH_AT // PAGE_BYTES, self.threads),
        ]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        if entry == _MAIN:
            return self._main()
        return self._sibling(args[0]) if entry == _SIBLING else self._snapshot(args[0])

    @property
    def _barrier(self) -> Barrier:
        return Barrier(_BARRIER, self.threads + 1)

    async def _main(self) -> None:
        await _map(SHARED_AT, 1)
        await _map(_FROZEN_AT, self.pages)
        for page in range(self.pages):
            await Store(_FROZEN_AT + page * PAGE_BYTES, WORD, pattern(page))
        await _map(_SCRATCH_AT, self.threads)
        await self._remap(0)
        siblings = [await Syscall("thread_create", (_SIBLING, n)) for n in range(self.threads)]
        for round_number in range(1, self.rounds + 1):
            await self._remap(round_number)
            if await Syscall("fork", (_SNAPSHOT, round_number)) < 0:
                await Mark("wrong", (round_number,), "fork failed")
            await self._protect()
            # Between the two barriers every sibling is paused.
            await Store(_PAUSE, WORD, round_number)
            await self._barrier.wait()
            await _call("munmap", _SCRATCH_AT, self.threads * PAGE_BYTES)
            await _map(_SCRATCH_AT, self.threads)
            if round_number == self.rounds:
                await Store(_STOP, WORD, 1)
            await self._barrier.wait()
            await Syscall("wait", (-1,))
        for thread_id in siblings:
            await Syscall("thread_join", (thread_id,))

    async def _remap(self, round_number: int) -> None:
        await Store(_SEQUENCE, WORD, 2 * round_number + 1)
        await _map(ARENA_AT, self.pages)
        for page in range(self.pages):
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, pattern(page, round_number))
        await Store(_SEQUENCE, WORD, 2 * round_number + 2)

    async def _protect(self) -> None:
        n_bytes = self.pages * PAGE_BYTES
        for prot in (1, RW):
            await _call("mprotect", _FROZEN_AT, n_bytes, prot)
        # Writable again: the owner may store, and the siblings still find the same words.
        await Store(_FROZEN_AT + WORD, WORD, pattern())

    async def _sibling(self, number: int) -> None:
        scratch = _SCRATCH_AT + number * PAGE_BYTES
        stopped = round_number = 0
        while not stopped:
            round_number += 1
            written, count = 0, 0
            while await Load(_PAUSE, WORD) != round_number:
                await expect(scratch, written)
                await self._read_window(number)
                count += 1
                written = pattern(number, round_number, count)
                await Store(scratch, WORD, written)
                await self._read_frozen(number)
                await Syscall("yield")
            await expect(scratch, written)
            await self._barrier.wait()
            await self._barrier.wait()
            stopped = await Load(_STOP, WORD)

    async def _snapshot(self, round_number: int) -> None:
        for page in range(self.pages):
            await expect(ARENA_AT + page * PAGE_BYTES, pattern(page, round_number))
        await self._read_frozen(0)

    async def _read_window(self, number: int) -> None:
        """Read the window, checking each read that was made within one round."""
        for turn in range(self.pages):
            page = (number + turn) % self.pages
            before = await Load(_SEQUENCE, WORD)
            word = await Load(ARENA_AT + page * PAGE_BYTES, WORD)
            after = await Load(_SEQUENCE, WORD)
            wanted = pattern(page, before // 2 - 1)
            if before == after and before % 2 == 0 and word != wanted:
                await Mark("wrong", (ARENA_AT + page * PAGE_BYTES, wanted, word), "an old round's")

    async def _read_frozen(self, number: int) -> None:
        for turn in range(self.pages):
            page = (number + turn) % self.pages
            await expect(_FROZEN_AT + page * PAGE_BYTES, pattern(page))


async def _map(gva: int, n_pages: int) -> None:
    """Map fresh zeroed pages at `gva`, over whatever is there."""
    n_bytes = n_pages * PAGE_BYTES
    flags = PRIVATE_ANONYMOUS | FIXED
    if await Syscall("mmap", (gva, n_bytes, RW, flags, -1, 0)) != gva:
        await Mark("wrong", (gva,), "mmap failed")


async def _call(name: str, *args: int) -> None:
    if await Syscall(name, args) != 0:
        await Mark("wrong", args, f"{name} failed")
