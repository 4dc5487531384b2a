"""What messages between actors cost, as ratios to raw trio in the same run.

    python -P benchmarks/runtime.py [--pairs N]

tell: one-way messages to a live consumer, bound 64, counted until the last one has been handled
(with keys: or superseded). The actor that is told is supervised.
ask: one question at a time, its reply awaited. Raw trio passes the object itself through a bounded
memory channel (an ask: through two); an actor's message is typed, encoded and decoded each way.

Each row is measured in pairs, raw trio and then the row, one right after the other, all rows in
turn; what is printed is the median of the pairs' ratios. Times are processor time, as nothing here
waits for anything but itself; they depend on the machine and its load, the ratios much less.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import process_time
from typing import TypeAlias

import anyio
import msgspec
import trio

from penumbra.actors.runtime import Actor, ActorSystem, AsyncActor, Coalesce, Mailbox

BOUND = 64
N_TELL, N_ASK = 10_000, 3_000

Measurement: TypeAlias = Callable[[int], Awaitable[float]]


class Message(msgspec.Struct, array_like=True, gc=False, frozen=True):
    op: int
    src: int
    dst: int
    gpa: int
    value: int


MESSAGE = Message(1, 2, 3, 0x7F00_1000, 0xDEAD_BEEF)


class Echo(Actor[Message, Message]):
    def receive(self, message: Message) -> Message:
        return message


class Sink(Actor[Message, None]):
    def receive(self, message: Message) -> None:
        return None


class KeyedSink(Sink):
    overflow = Coalesce(lambda message: message.gpa)


class AsyncEcho(AsyncActor[Message, Message]):
    async def receive(self, message: Message) -> Message:
        return message


# What is compared with.


async def trio_tell(n: int) -> float:
    sending, receiving = trio.open_memory_channel[Message](BOUND)

    async def send_all() -> None:
        async with sending:
            for _ in range(n):
                await sending.send(MESSAGE)

    start = process_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        async for _ in receiving:
            pass
    return process_time() - start


async def trio_ask(n: int) -> float:
    ask, asked = trio.open_memory_channel[Message](BOUND)
    answer, answered = trio.open_memory_channel[Message](BOUND)

    async def serve() -> None:
        async for message in asked:
            await answer.send(message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        start = process_time()
        for _ in range(n):
            await ask.send(MESSAGE)
            await answered.receive()
        took = process_time() - start
        nursery.cancel_scope.cancel()
    return took


async def asyncio_queue_tell(n: int) -> float:
    queue: asyncio.Queue[Message] = asyncio.Queue(BOUND)

    async def send_all() -> None:
        for _ in range(n):
            await queue.put(MESSAGE)

    start = process_time()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send_all())
        for _ in range(n):
            await queue.get()
    return process_time() - start


# What is measured.


async def mailbox_tell(n: int) -> float:
    mailbox = Mailbox[Message](Message, bound=BOUND)

    async def send_all() -> None:
        for _ in range(n):
            await mailbox.send(MESSAGE)
        mailbox.close()

    n_seen = 0
    start = process_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send_all)
        while batch := await mailbox.drain():
            for _ in batch:
                n_seen += 1
    assert n_seen == n
    return process_time() - start


async def actor_tell(n: int) -> float:
    async with ActorSystem("benchmark") as system:
        ref = system.supervise("all").spawn(Sink, bound=BOUND)
        start = process_time()
        for _ in range(n):
            await ref.send(MESSAGE)
        await system.wait_quiet()
        return process_time() - start


async def actor_tell_keyed(n: int) -> float:
    messages = [Message(1, 2, 3, page << 12, 0xDEAD_BEEF) for page in range(BOUND)]
    async with ActorSystem("benchmark") as system:
        ref = system.supervise("all").spawn(KeyedSink, bound=BOUND)
        start = process_time()
        for i in range(n):
            await ref.send(messages[i % BOUND])
        await system.wait_quiet()
        return process_time() - start


async def async_actor_ask(n: int) -> float:
    async with ActorSystem("benchmark") as system:
        ref = system.spawn(AsyncEcho())
        start = process_time()
        for _ in range(n):
            await ref.ask(MESSAGE)
        return process_time() - start


async def actor_ask(n: int) -> float:
    async with ActorSystem("benchmark") as system:
        ref = system.spawn(Echo())
        start = process_time()
        for _ in range(n):
            await ref.ask(MESSAGE)
        return process_time() - start


async def actor_ask_nowait(n: int) -> float:
    async with ActorSystem("benchmark") as system:
        ref = system.spawn(Echo())
        start = process_time()
        for _ in range(n):
            ref.ask_nowait(MESSAGE)
        return process_time() - start


async def actor_ask_queued(n: int) -> float:
    async with ActorSystem("benchmark") as system:
        ref = system.spawn(Echo())
        start = process_time()
        for _ in range(n):
            await ref.ask(MESSAGE, inline=False)
        return process_time() - start


@dataclass(frozen=True)
class Row:
    """One line of the table: what, on which event loop, against what of raw trio."""

    name: str
    measure: Measurement
    backend: str
    base: Measurement
    n: int


ROWS = (
    Row("asyncio.Queue tell (object)", asyncio_queue_tell, "asyncio", trio_tell, N_TELL),
    Row("mailbox tell, trio", mailbox_tell, "trio", trio_tell, N_TELL),
    Row("mailbox tell, asyncio", mailbox_tell, "asyncio", trio_tell, N_TELL),
    Row("actor tell, trio", actor_tell, "trio", trio_tell, N_TELL),
    Row("actor tell, asyncio", actor_tell, "asyncio", trio_tell, N_TELL),
    Row("actor tell, 64 keys, trio", actor_tell_keyed, "trio", trio_tell, N_TELL),
    Row("actor tell, 64 keys, asyncio", actor_tell_keyed, "asyncio", trio_tell, N_TELL),
    Row("ask_nowait", actor_ask_nowait, "trio", trio_ask, N_ASK),
    Row("ask inline, trio", actor_ask, "trio", trio_ask, N_ASK),
    Row("ask inline, asyncio", actor_ask, "asyncio", trio_ask, N_ASK),
    Row("ask queued, trio", actor_ask_queued, "trio", trio_ask, N_ASK),
    Row("ask queued, asyncio", actor_ask_queued, "asyncio", trio_ask, N_ASK),
    Row("ask of an async actor, trio", async_actor_ask, "trio", trio_ask, N_ASK),
    Row("ask of an async actor, asyncio", async_actor_ask, "asyncio", trio_ask, N_ASK),
)


def measure(measurement: Measurement, backend: str, n: int) -> float:
    """Return the microseconds that one message took."""
    gc.collect()
    return anyio.run(measurement, n, backend=backend) / n * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description="Ratios of actor messages to raw trio.")
    parser.add_argument("--pairs", type=int, default=9, help="pairs per row (default: 9)")
    n_pairs: int = parser.parse_args().pairs
    pairs: dict[Row, list[tuple[float, float]]] = {row: [] for row in ROWS}
    for _ in range(n_pairs):
        for row in ROWS:
            base = measure(row.base, "trio", row.n)
            pairs[row].append((base, measure(row.measure, row.backend, row.n)))
    lines = [f"{'row':30} {'raw trio us':>12} {'us':>8} {'time ratio':>11} {'speed ratio':>12}"]
    for row in ROWS:
        base = statistics.median(base for base, _ in pairs[row])
        took = statistics.median(took for _, took in pairs[row])
        ratio = statistics.median(took / base for base, took in pairs[row])
        lines.append(f"{row.name:30} {base:12.2f} {took:8.2f} {ratio:11.3f} {1 / ratio:12.1f}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
