"""Calls that move bytes between a file's page and user memory: the kernel uses user addresses.

The kernel reads and writes the caller's memory through the caller's own mapping, in supervisor
mode. CR0.WP is set, so a store there to a page that is shared copy-on-write faults as the user's
own would, and the page is copied first; what the user may not do the kernel does not do for it. A
page of the pool lies between file and user: the copy to or from the user may fault, sleep, and go
on on another CPU, and neither a slot nor a lock may be held then.
"""

from __future__ import annotations

from penumbra.guest.kernel.faults import Faults
from penumbra.guest.kernel.frames import TablePool
from penumbra.guest.kernel.layout import Layout
from penumbra.guest.kernel.memory_calls import MemoryCalls
from penumbra.guest.kernel.process import Thread
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.operations import Copy, Fill, SetInterrupts

EFAULT, EINVAL = -14, -22
_WORD = 8


class FileCalls:
    """pread and pwrite of the first bytes of one page of a file.

    Invariant: a bounce page is held by a call under way, and full of zeros when given back.
    """

    def __init__(
        self, memory: MemoryCalls, faults: Faults, pool: TablePool, layout: Layout
    ) -> None:
        self._memory = memory
        self._faults = faults
        self._pool = pool
        self._layout = layout

    async def pread(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(file, page, address, bytes) -> bytes: from the file's page to user memory."""
        problem = self._problem(args)
        if problem:
            return problem
        file_id, page, gva, n_bytes = args
        bounce = thread.bounce = self._pool.take()
        await self._faults.read_page(thread, file_id, page, bounce)
        await SetInterrupts(True)
        thread.user_access = True
        await Copy(gva, self._layout.direct(bounce), n_bytes)
        thread.user_access = False
        await self.drop_bounce(thread)
        return n_bytes

    async def pwrite(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(file, page, address, bytes) -> bytes: from user memory to the file's page."""
        problem = self._problem(args)
        if problem:
            return problem
        file_id, page, gva, n_bytes = args
        bounce = thread.bounce = self._pool.take()
        thread.user_access = True
        await Copy(self._layout.direct(bounce), gva, n_bytes)
        thread.user_access = False
        await self._faults.write_page(thread, file_id, page, bounce, n_bytes)
        await SetInterrupts(True)
        await self.drop_bounce(thread)
        return n_bytes

    async def drop_bounce(self, thread: Thread) -> None:
        """Give a call's page back, cleared; nothing if the thread holds none."""
        gfn, thread.bounce = thread.bounce, None
        if gfn is not None:
            await Fill(self._layout.direct(gfn), PAGE_BYTES, 0)
            self._pool.drop(gfn)

    def _problem(self, args: tuple[int, ...]) -> int:
        """Return the error of untrusted arguments, 0 if there is none."""
        file_id, page, gva, n_bytes = args
        if file_id < 0 or page < 0 or not 0 < n_bytes <= PAGE_BYTES:
            return EINVAL
        if gva % _WORD or n_bytes % _WORD:
            return EINVAL
        first, last = gva >> PAGE_SHIFT, (gva + n_bytes - 1) >> PAGE_SHIFT
        return 0 if self._memory.allowed(first, last - first + 1) else EFAULT
