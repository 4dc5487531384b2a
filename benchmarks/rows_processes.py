"""Two processes over shared memory, against raw trio in one, and against Thespian's two.

Wall time: two processes run at once, if the machine has two processors free; with less the ratios
fall. The child of a row lives as long as its group is measured, and waits between two samples.
"""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import raw
from harness import Kind, Line, Row, Sampler, Side, Unavailable, pair
from raw import MESSAGE, Message
from thespian_echo import thespian_tells

from penumbra.actors.core.ring import RingReader, RingWriter, ring_words
from penumbra.actors.core.shared_words import SharedWords
from penumbra.actors.processes import (
    Line as SharedLine,
)
from penumbra.actors.processes import (
    LineEnd,
    Receiver,
    Seat,
    Sender,
    Worker,
    WorkerFabric,
)

CAPACITY = 64
N_RECORDS, N_STORES = 50_000, 20_000
N_ENTRIES, IN_FLIGHT = 32, 32
RECORD = struct.Struct("<5Q")

_SPAWN = get_context("spawn")


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run a process that does as many units as it is told, until told 0."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    try:
        yield ours
        ours.send(0)
        process.join(10)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


# ---- a bare ring ---------------------------------------------------------------------------------


def read_records(name: str, n_words: int, commands: Connection) -> None:
    shared = SharedWords.attach(name, n_words)
    reader = RingReader(shared.words, CAPACITY, RECORD.size)
    unpack = RECORD.unpack
    while n := commands.recv():
        while n > 0:
            records = [unpack(record) for record in reader.drain()]
            n -= len(records)
            if not records:
                os.sched_yield()
        commands.send(n)
    reader.close()
    shared.close()


@contextmanager
def ring() -> Iterator[Sampler]:
    """Five words packed into a ring of shared words, read and unpacked by the other process."""
    n_words = ring_words(CAPACITY, RECORD.size)
    shared = SharedWords.create(n_words)
    writer = RingWriter(shared.words, CAPACITY, RECORD.size)
    with child(read_records, shared.name, n_words) as commands:

        def side() -> float:
            offer, pack = writer.offer, RECORD.pack
            commands.send(N_RECORDS)
            start = perf_counter()
            for i in range(N_RECORDS):
                while not offer(pack(i, 1, 2, 3, 4)):
                    os.sched_yield()
            commands.recv()
            return (perf_counter() - start) / N_RECORDS

        yield pair(raw.wall_tell, side)
    writer.close()
    shared.close()


# ---- full tells ----------------------------------------------------------------------------------


def receive_messages(end: LineEnd, commands: Connection) -> None:
    """Be the receiver of a line, with a handler called for every message."""
    receiver = Receiver[Message](end, Message)
    total = 0

    def handle(message: Message) -> None:
        nonlocal total
        total += message.value

    while n := commands.recv():
        while n > 0:
            receiver.wait()
            messages = receiver.drain()
            n -= len(messages)
            for message in messages:
                handle(message)
        commands.send(total)
    receiver.close()


@contextmanager
def tells(batch: int, yardstick: Callable[[], Any]) -> Iterator[Sampler]:
    """Typed, encoded, bounded messages with a doorbell, `batch` per offer; decoded and handled."""
    line = SharedLine(CAPACITY)
    messages = [MESSAGE] * batch
    with yardstick() as other, child(receive_messages, line.end()) as commands:
        sender = Sender[Message](line.end(), Message)

        def side() -> float:
            n = N_RECORDS - N_RECORDS % batch
            commands.send(n)
            start = perf_counter()
            rest = n
            if batch == 1:
                for _ in range(n):
                    while not sender.offer(MESSAGE):
                        os.sched_yield()
            while batch > 1 and rest:
                n_sent = sender.offer_all(messages[:rest])
                rest -= n_sent
                if not n_sent:
                    os.sched_yield()
            commands.recv()
            return (perf_counter() - start) / n

        yield pair(other, side)
        sender.close()
    line.close()


@contextmanager
def raw_trio() -> Iterator[Side]:
    yield raw.wall_tell


@contextmanager
def thespian() -> Iterator[Side]:
    if importlib.util.find_spec("thespian") is None:
        raise Unavailable("Thespian is not installed (extra `bench`)")
    with thespian_tells(1_000) as side:
        yield side


# ---- stores of a fabric --------------------------------------------------------------------------


def derive(value: int) -> int:
    return value ^ 0xFFFF


def follow(seat: Seat, commands: Connection) -> None:
    """Be the consumer: keep all entries derived, say how far after every event.

    Stores are numbered and each entry holds the number of its last one: the greatest before an
    event is as far as that event makes this process coherent.
    """
    worker = Worker(seat, derive)
    primary = worker.primary
    for entry in range(N_ENTRIES):
        worker.read(entry)
    while n := commands.recv():
        while (followed := primary[N_ENTRIES]) < n:
            # An event may take the patch of a store made after `done` was read: its bell is gone.
            if max(primary[:N_ENTRIES]) <= followed:
                worker.wait()
            done = max(primary[:N_ENTRIES])
            worker.event()
            primary[N_ENTRIES] = done
        wrong = [e for e in range(N_ENTRIES) if worker.read(e) != derive(primary[e])]
        assert not wrong, wrong
        commands.send(n)
    worker.leave()


@contextmanager
def stores(coalesces: bool) -> Iterator[Sampler]:
    """`Worker.store` until another process has made its derived value coherent.

    Never more than 32 stores ahead of the consumer's last event, so that no channel overflows.
    """
    fabric = WorkerFabric(2, N_ENTRIES + 1, capacity=CAPACITY, coalesces=coalesces)
    with child(follow, fabric.seat(1)) as commands:
        worker = Worker(fabric.seat(0), derive)
        number = 0

        def side() -> float:
            nonlocal number
            primary, store, first = worker.primary, worker.store, number
            commands.send(first + N_STORES)
            start = perf_counter()
            followed = first
            for number in range(first + 1, first + N_STORES + 1):
                store(number % N_ENTRIES, number)
                while number - followed >= IN_FLIGHT:
                    followed = max(primary[N_ENTRIES], first)
                    if number - followed >= IN_FLIGHT:
                        os.sched_yield()
            commands.recv()
            return (perf_counter() - start) / N_STORES

        yield pair(raw.wall_tell, side)
    worker.leave()
    fabric.close()


LINES: tuple[Line, ...] = (
    Row("processes/ring", "bare ring record between processes ÷ raw trio channel in one",
        Kind.SPEED, 15.0, ring),
    Row("processes/tell", "full tell between processes ÷ raw trio channel in one",
        Kind.SPEED, 8.0, partial(tells, 1, raw_trio)),
    Row("processes/tell-batched", "the same, 32 messages an offer",
        Kind.SPEED, None, partial(tells, 32, raw_trio)),
    Row("processes/tell-thespian", "full tell ÷ Thespian multiprocQueueBase, both in two processes",
        Kind.SPEED, 80.0, partial(tells, 1, thespian)),
    Row("processes/store", "store told to a worker process and followed ÷ raw trio channel in one",
        Kind.SPEED, None, partial(stores, False)),
    Row("processes/store-coalescing", "the same, fenced and coalescing",
        Kind.SPEED, None, partial(stores, True)),
)  # fmt: skip
