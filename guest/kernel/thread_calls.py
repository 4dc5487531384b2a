"""Calls of threads that share an address space: create, join, yield, and futexes."""

from __future__ import annotations

from penumbra.guest.kernel.paging import Paging
from penumbra.guest.kernel.process import State, Thread
from penumbra.guest.kernel.process_calls import ProcessCalls, process_of
from penumbra.guest.kernel.scheduler import Scheduler
from penumbra.guest.kernel.words import Words, acquire, release
from penumbra.hw.formats import PAGE_SHIFT
from penumbra.hw.operations import Load

EAGAIN = -11


class ThreadCalls:
    """Makes threads wait for each other.

    A futex is a 4-byte word of user memory. The lock makes looking at it and going to sleep one:
    who changes the word and then wakes either finds the sleeper or has changed it in time.

    Invariant: a waiting thread is blocked, or has been woken and not yet run.
    """

    def __init__(
        self, processes: ProcessCalls, scheduler: Scheduler, words: Words, paging: Paging
    ) -> None:
        self._paging = paging
        self._processes = processes
        self._scheduler = scheduler
        self._futex_lock = words.take()
        self._futexes: dict[tuple[int, int], list[Thread]] = {}

    async def thread_create(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(entry, arguments...) -> id of a thread that starts there in this address space."""
        new = self._processes.add_thread(process_of(thread), args[0], args[1:])
        await self._processes.start(new)
        return new.thread_id

    async def thread_join(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(thread id) -> 0 once that thread of this process has ended."""
        process = process_of(thread)
        other = self._processes.threads.get(args[0])
        while other is not None and other in process.threads and not process.dying:
            thread.state = State.BLOCKED
            other.joiners.append(thread)
            await self._scheduler.block(thread)
        return 0

    async def yield_cpu(self, thread: Thread, _args: tuple[int, ...]) -> int:
        """() -> 0: let others run first."""
        thread.cpu.must_schedule = True
        return 0

    async def futex_wait(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(address, expected 4-byte value) -> 0 when woken, EAGAIN if the value is another."""
        gva, expected = args
        process = process_of(thread)
        if self._paging.enabled:  # the look under the lock must find the page there
            await self._paging.pin(thread, process.space, gva >> PAGE_SHIFT)
            thread.user_access = True
            await Load(gva, 4)
            thread.user_access = False
        await acquire(self._futex_lock)
        thread.user_access, thread.may_sleep = True, False
        value = await Load(gva, 4)
        thread.user_access, thread.may_sleep = False, True
        self._paging.unpin(thread)
        if value != expected or process.dying:
            await release(self._futex_lock)
            return EAGAIN
        waiters = self._futexes.setdefault((process.pid, gva), [])
        thread.state = State.BLOCKED
        waiters.append(thread)
        await release(self._futex_lock)
        await self._scheduler.block(thread)
        if thread in waiters:  # woken by the end of the process
            waiters.remove(thread)
        return 0

    async def abandon_user_access(self, thread: Thread) -> None:
        """Give up a user access that faulted for good, with the lock that may be held for it."""
        assert thread.user_access
        thread.user_access = False
        self._paging.unpin(thread)
        if not thread.may_sleep:
            thread.may_sleep = True
            await release(self._futex_lock)

    async def futex_wake(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(address, number) -> how many waiters were woken, first come first."""
        gva, number = args
        key = (process_of(thread).pid, gva)
        await acquire(self._futex_lock)
        waiters = self._futexes.pop(key, [])
        woken, left = waiters[:number], waiters[number:]
        if left:
            self._futexes[key] = left
        for waiter in woken:
            await self._scheduler.wake(waiter)
        await release(self._futex_lock)
        return len(woken)
