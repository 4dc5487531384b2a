"""The yardsticks: what a message costs with nothing around it.

Raw trio passes the object itself through a bounded memory channel, one task to another; a raw ask
takes two of them. `asyncio.Queue` is the same on asyncio, whose `put` does not yield until the
queue is full. Processor time: nothing here waits for anything but itself. `wall` is for rows of
several processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter, process_time

import msgspec
import trio

BOUND = 64
N_TELLS, N_ASKS = 10_000, 3_000

Clock = Callable[[], float]


class Message(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """The size of what actors of a machine tell each other."""

    op: int
    src: int
    dst: int
    gpa: int
    value: int


MESSAGE = Message(1, 2, 3, 0x7F00_1000, 0xDEAD_BEEF)


async def _tells(n: int, clock: Clock) -> float:
    sending, receiving = trio.open_memory_channel[Message](BOUND)

    async def send_all() -> None:
        async with sending:
            for _ in range(n):
                await sending.send(MESSAGE)

    start = clock()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        async for _ in receiving:
            pass
    return (clock() - start) / n


def tell() -> float:
    """Seconds per message from one trio task to another."""
    return trio.run(_tells, N_TELLS, process_time)


def wall_tell() -> float:
    """The same by the wall clock."""
    return trio.run(_tells, N_TELLS, perf_counter)


async def _asks(n: int) -> float:
    ask_sending, asked = trio.open_memory_channel[Message](BOUND)
    answer, answered = trio.open_memory_channel[Message](BOUND)

    async def serve() -> None:
        async for message in asked:
            await answer.send(message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        start = process_time()
        for _ in range(n):
            await ask_sending.send(MESSAGE)
            await answered.receive()
        took = process_time() - start
        nursery.cancel_scope.cancel()
    return took / n


def ask() -> float:
    """Seconds per question and answer between two trio tasks."""
    return trio.run(_asks, N_ASKS)


async def queue_tells(n: int = N_TELLS) -> float:
    """Seconds per message through an `asyncio.Queue`, in whatever asyncio loop runs."""
    queue: asyncio.Queue[Message] = asyncio.Queue(BOUND)

    async def send_all() -> None:
        for _ in range(n):
            await queue.put(MESSAGE)

    start = process_time()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send_all())
        for _ in range(n):
            await queue.get()
    return (process_time() - start) / n
