"""A tree of processes that all write the pages they share copy-on-write."""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import (
    ARENA_AT,
    FIXED,
    PRIVATE_ANONYMOUS,
    RW,
    SHARED_ANONYMOUS,
    SHARED_AT,
    WORD,
    expect,
    pattern,
)
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Mark, Store, Syscall

_MAIN, _CHILD = 0, 1


@dataclass(frozen=True)
class ForkStorm:
    """Each process forks `children` children, `depth` generations deep, `rounds` times over.

    A child must find what its parent had written before the fork, whatever the parent writes after
    it; what the child writes must never reach the parent. Each process then raises its own flag in
    a shared page, which must reach the first one.
    """

    pages: int = 24
    children: int = 3
    depth: int = 2
    rounds: int = 1

    @property
    def name(self) -> str:
        return "fork-storm"

    @property
    def peak_pages(self) -> int:
        return (self.pages + 2) * self._tree(self.depth) + 8

    def _tree(self, depth: int) -> int:
        """Return the number of processes in a tree `depth` generations below its root."""
        return 1 + (self.children * self._tree(depth - 1) if depth else 0)

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        n_flags = -(-self._tree(self.depth) * WORD // PAGE_BYTES) + 1
        return [(ARENA_AT // PAGE_BYTES, self.pages), (SHARED_AT // PAGE_BYTES, n_flags)]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main() if entry == _MAIN else self._child(*args)

    async def _main(self) -> None:
        n_processes = self._tree(self.depth)
        for first_vpn, n_pages in self.used_ranges():
            shared = first_vpn == SHARED_AT // PAGE_BYTES
            flags = FIXED | (SHARED_ANONYMOUS if shared else PRIVATE_ANONYMOUS)
            args = (first_vpn * PAGE_BYTES, n_pages * PAGE_BYTES, RW, flags, -1, 0)
            if await Syscall("mmap", args) != args[0]:
                await Mark("wrong", args[:1], "mmap failed")
                return
        for round_number in range(1, self.rounds + 1):
            await self._offspring(0, self.depth, round_number)
            for number in range(1, n_processes):
                await expect(SHARED_AT + number * WORD, pattern(number, round_number))

    async def _child(
        self, number: int, parent: int, parent_version: int, depth: int, round_number: int
    ) -> None:
        await self._read(parent, parent_version)
        await self._offspring(number, depth, round_number)
        await Store(SHARED_AT + number * WORD, WORD, pattern(number, round_number))

    async def _offspring(self, number: int, depth: int, round_number: int) -> None:
        """Fork the children, writing every page after each fork, and see that all is still ours."""
        version = round_number * 1000
        await self._write(number, version)
        n_children = self.children if depth else 0
        subtree = self._tree(depth - 1) if depth else 0
        for child in range(n_children):
            child_number = number + 1 + child * subtree
            args = (_CHILD, child_number, number, version, depth - 1, round_number)
            if await Syscall("fork", args) < 0:
                await Mark("wrong", (child_number,), "fork failed")
            version += 1
            await self._write(number, version)
        for _ in range(n_children):
            await Syscall("wait", (-1,))
        await self._read(number, version)

    async def _write(self, number: int, version: int) -> None:
        for page in range(self.pages):
            gva = ARENA_AT + page * PAGE_BYTES
            await Store(gva + (page * 40) % PAGE_BYTES, WORD, pattern(number, page, version))

    async def _read(self, number: int, version: int) -> None:
        for page in range(self.pages):
            gva = ARENA_AT + page * PAGE_BYTES
            await expect(gva + (page * 40) % PAGE_BYTES, pattern(number, page, version))
