"""A server whose threads map a file for each request, send it, and unmap it again."""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.kernel.areas import page_word
from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import ARENA_AT, FIXED, expect, map_anonymous
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.operations import Copy, Mark, Syscall

_MAIN = 0
_MAP_SHARED = 1
_BUFFERS_AT = ARENA_AT + 0x1000_0000


@dataclass(frozen=True)
class MmapServer:
    """`workers` threads serve `requests` requests each.

    A request maps one of `files` files of `pages` pages, copies it to the worker's socket buffer
    `copies` times, and unmaps it. The buffer must then hold that file. A worker's mappings stand at
    `spread` addresses in turn.
    """

    workers: int = 4
    requests: int = 12
    files: int = 3
    pages: int = 2
    copies: int = 2
    spread: int = 32

    @property
    def name(self) -> str:
        return "mmap-server"

    @property
    def peak_pages(self) -> int:
        return (self.files + self.workers + 1) * self.pages + 16

    def image(self, number: int) -> Image:
        return Image(number)

    def used_ranges(self) -> list[tuple[int, int]]:
        return [
            (ARENA_AT // PAGE_BYTES, self.workers * self.spread * self.pages),
            (_BUFFERS_AT // PAGE_BYTES, self.workers * self.pages),
        ]

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        return self._main() if entry == _MAIN else self._worker(args[0])

    async def _main(self) -> None:
        await map_anonymous(_BUFFERS_AT, self.workers * self.pages)
        others = [await Syscall("thread_create", (1, n)) for n in range(1, self.workers)]
        await self._worker(0)
        for thread_id in others:
            await Syscall("thread_join", (thread_id,))

    async def _worker(self, number: int) -> None:
        n_bytes = self.pages * PAGE_BYTES
        buffer = _BUFFERS_AT + number * n_bytes
        for request in range(self.requests):
            file = 20 + (number + request) % self.files
            at = ARENA_AT + (number * self.spread + request % self.spread) * n_bytes
            args = (at, n_bytes, 1, _MAP_SHARED | FIXED, file, 0)
            if await Syscall("mmap", args) != at:
                await Mark("wrong", (at, request), "mmap failed")
            for _ in range(self.copies):
                await Copy(buffer, at, n_bytes)
            for page in range(self.pages):
                await expect(buffer + page * PAGE_BYTES, page_word(file, page))
            if await Syscall("munmap", (at, n_bytes)) != 0:
                await Mark("wrong", (at, request), "munmap failed")
