"""What telling another process costs, as ratios to raw trio in the same run.

    PYTHONPATH=build/ns python -P benchmarks/processes.py [--pairs N]

raw trio: a message object through a bounded memory channel, one task to another in one process.
bare ring record: five words packed into a ring of shared words, read and unpacked by the other
process.
full tell: a typed message, encoded, through a bounded line, with a doorbell; decoded and handled.
store: `Worker.store` in one process until another has made its derived value coherent: pending,
store, derive, patch, bell, doorbell; event, source comparison, install. A producer lets at most 32
stores be under way, so that no channel overflows.

A row's sample is timed right after a sample of raw trio; printed are the median of the pairs'
ratios and their range. Wall time: two processes run at once, if the machine has two processors
free; with less than that the ratios fall.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import struct
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter

import msgspec
import trio

from penumbra.actors.core.ring import RingReader, RingWriter, ring_words
from penumbra.actors.core.shared_words import SharedWords
from penumbra.actors.processes import (
    Line,
    LineEnd,
    Receiver,
    Seat,
    Sender,
    Worker,
    WorkerFabric,
)

CAPACITY = 64
N_TELLS, N_RECORDS, N_STORES = 5_000, 50_000, 20_000
PAIRS = 9
N_ENTRIES, IN_FLIGHT = 32, 32

_SPAWN = get_context("spawn")


async def _tells(n: int) -> float:
    send, receive = trio.open_memory_channel[object](CAPACITY)
    message = object()

    async def consume() -> None:
        for _ in range(n):
            await receive.receive()

    async with trio.open_nursery() as nursery:
        start = perf_counter()
        nursery.start_soon(consume)
        for _ in range(n):
            await send.send(message)
    return (perf_counter() - start) / n


def tell() -> float:
    """Seconds per message from one trio task to another."""
    return trio.run(_tells, N_TELLS)


# ---- tells ---------------------------------------------------------------------------------------


class Message(msgspec.Struct, array_like=True, gc=False, frozen=True):
    op: int
    src: int
    dst: int
    gpa: int
    value: int


MESSAGE = Message(1, 2, 3, 0x7F00_1000, 0xDEAD_BEEF)
RECORD = struct.Struct("<5Q")


def read_records(name: str, n_words: int, commands: Connection) -> None:
    """Be the reader of the bare ring: as many records per command, then an answer."""
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


# ---- coherence -----------------------------------------------------------------------------------


def derive(value: int) -> int:
    return value ^ 0xFFFF


def follow(seat: Seat, commands: Connection) -> None:
    """Be the consumer: keep all entries derived, say how far after every event."""
    worker = Worker(seat, derive)
    primary = worker.primary
    for entry in range(N_ENTRIES):
        worker.read(entry)
    while n := commands.recv():
        while primary[N_ENTRIES + 1] < n:
            worker.wait()
            done = primary[N_ENTRIES]
            worker.event()
            primary[N_ENTRIES + 1] = done
        wrong = [e for e in range(N_ENTRIES) if worker.read(e) != derive(primary[e])]
        assert not wrong, wrong
        commands.send(n)
    worker.leave()


def store_all(worker: Worker, n: int) -> None:
    """Store, never more than `IN_FLIGHT` stores ahead of the consumer's last event."""
    primary, store = worker.primary, worker.store
    start = primary[N_ENTRIES]
    followed = start
    for i in range(start + 1, start + n + 1):
        store(i % N_ENTRIES, i)
        primary[N_ENTRIES] = i
        while i - followed >= IN_FLIGHT:
            followed = primary[N_ENTRIES + 1]
            if i - followed >= IN_FLIGHT:
                os.sched_yield()


# ---- rows ----------------------------------------------------------------------------------------


class Ring:
    """The two processes of the bare ring."""

    def __init__(self) -> None:
        n_words = ring_words(CAPACITY, RECORD.size)
        self.shared = SharedWords.create(n_words)
        self.writer = RingWriter(self.shared.words, CAPACITY, RECORD.size)
        self.commands, theirs = _SPAWN.Pipe()
        arguments = (self.shared.name, n_words, theirs)
        self.process = _SPAWN.Process(target=read_records, args=arguments)
        self.process.start()

    def measure(self) -> float:
        """Seconds per record, until the last one has been read."""
        offer, pack = self.writer.offer, RECORD.pack
        self.commands.send(N_RECORDS)
        start = perf_counter()
        for i in range(N_RECORDS):
            while not offer(pack(i, 1, 2, 3, 4)):
                os.sched_yield()
        self.commands.recv()
        return (perf_counter() - start) / N_RECORDS

    def close(self) -> None:
        self.commands.send(0)
        self.process.join()
        self.writer.close()
        self.shared.close()


class Tells:
    """The two processes of a line, with one message per offer or a batch of them."""

    def __init__(self, batch: int) -> None:
        self.line = Line(CAPACITY)
        self.batch = [MESSAGE] * batch
        self.commands, theirs = _SPAWN.Pipe()
        arguments = (self.line.end(), theirs)
        self.process = _SPAWN.Process(target=receive_messages, args=arguments)
        self.process.start()
        self.sender = Sender[Message](self.line.end(), Message)

    def measure(self) -> float:
        """Seconds per message, until the last one has been handled."""
        n = N_RECORDS - N_RECORDS % len(self.batch)
        self.commands.send(n)
        start = perf_counter()
        if len(self.batch) == 1:
            offer = self.sender.offer
            for _ in range(n):
                while not offer(MESSAGE):
                    os.sched_yield()
        else:
            rest = n
            while rest:
                n_sent = self.sender.offer_all(self.batch[:rest])
                rest -= n_sent
                if not n_sent:
                    os.sched_yield()
        self.commands.recv()
        return (perf_counter() - start) / n

    def close(self) -> None:
        self.commands.send(0)
        self.process.join()
        self.sender.close()
        self.line.close()


class Fabric:
    """The two processes of a fabric."""

    def __init__(self, *, coalesces: bool) -> None:
        self.fabric = WorkerFabric(2, N_ENTRIES + 2, capacity=CAPACITY, coalesces=coalesces)
        self.commands, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=follow, args=(self.fabric.seat(1), theirs))
        self.process.start()
        self.worker = Worker(self.fabric.seat(0), derive)

    def measure(self) -> float:
        """Seconds per store, until all that is derived from the last one is coherent."""
        self.commands.send(self.worker.primary[N_ENTRIES] + N_STORES)
        start = perf_counter()
        store_all(self.worker, N_STORES)
        self.commands.recv()
        return (perf_counter() - start) / N_STORES

    def close(self) -> None:
        self.commands.send(0)
        self.process.join()
        self.worker.leave()
        self.fabric.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Ratios of telling another process to raw trio.")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"per row (default: {PAIRS})")
    n_pairs: int = parser.parse_args().pairs
    parts: dict[str, Ring | Tells | Fabric] = {
        "bare ring record": Ring(),
        "full tell": Tells(1),
        "full tell, in batches of 32": Tells(32),
        "store, unfenced": Fabric(coalesces=False),
        "store, coalescing": Fabric(coalesces=True),
    }
    rows: dict[str, Callable[[], float]] = {name: part.measure for name, part in parts.items()}
    samples: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for _ in range(n_pairs):
        for row, measure in rows.items():
            samples[row].append((tell(), measure()))
    for part in parts.values():
        part.close()
    sys.stdout.write(f"{platform.machine()}, {os.cpu_count()} processors, load {_load()}\n")
    sys.stdout.write(f"{'':28} raw trio us       us    raw / row      range\n")
    for row, pairs in samples.items():
        ratios = sorted(told / spent for told, spent in pairs)
        told = statistics.median(told for told, _ in pairs) * 1e6
        spent = statistics.median(spent for _, spent in pairs) * 1e6
        spread = f"{ratios[0]:.1f}-{ratios[-1]:.1f}"
        ratio = statistics.median(ratios)
        sys.stdout.write(f"{row:28} {told:11.2f} {spent:8.2f} {ratio:11.1f}x {spread:>11}\n")
    return 0


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
