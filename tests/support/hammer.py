"""What the worker processes of the tests do: they must be importable by name from a new process.

A primary word holds the number of the store that wrote it, and store i of producer p goes to entry
i % N_ENTRIES of p's own range. Behind the ranges, each producer says which store of its has ended,
and each consumer how many events it has had.
What is derived is the word times an odd number: from any derived value the store can be told.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec

from penumbra.actors.processes import LineEnd, Receiver, Seat, Worker, WorkerFabric

N_ENTRIES = 16
HANG = 20.0
"""Seconds after which a test gives up; nothing that passes waits as long."""

_WORD = 1 << 64
_ODD = 0x9E37_79B9_7F4A_7C15
_INVERSE = pow(_ODD, -1, _WORD)


def _every(entry: int) -> bool:
    return entry >= 0


_COVERS: tuple[Callable[[int], bool], ...] = (
    lambda entry: entry % 2 == 0,
    lambda entry: entry % 2 == 1,
    _every,
)

SPAWN = get_context("spawn")


def derive(value: int) -> int:
    return value * _ODD % _WORD


def stored(derived: int) -> int:
    """Tell the store from what was derived."""
    return derived * _INVERSE % _WORD


def primary_words(n: int) -> int:
    return (N_ENTRIES + 2) * n


def done_word(n: int, producer: int) -> int:
    return N_ENTRIES * n + producer


def events_word(n: int, consumer: int) -> int:
    return (N_ENTRIES + 1) * n + consumer


def last_store(producer: int, entry: int, done: int) -> int:
    """Return the last of `done` stores that went to an entry; 0 if none did."""
    into = entry - N_ENTRIES * producer
    return max(0, done - (done - into) % N_ENTRIES)


@dataclass(frozen=True)
class Seen:
    """What a consumer reports when all producers are done.

    Attributes:
        torn: Derived values that no store to their entry can have given.
        lost: Entries that an event left older than what had been stored before it.
        differing: Entries that differ from the primary data at the end.
    """

    torn: list[tuple[int, int]]
    lost: list[tuple[int, int, int]]
    differing: list[tuple[int, int]]
    n_events: int
    n_taken: int
    n_derived: int
    n_drops: int


def store_all(seat: Seat, n_stores: int, consumer: int = -1) -> None:
    """Be a producer; given a consumer, let it take a whole event after every few stores."""
    worker = Worker(seat, derive)
    n, me = seat.plan.n, seat.index
    events = events_word(n, consumer)
    for i in range(1, n_stores + 1):
        worker.store(N_ENTRIES * me + i % N_ENTRIES, i)
        worker.primary[done_word(n, me)] = i
        if consumer >= 0 and i < n_stores and not i % (2 * N_ENTRIES):
            before = worker.primary[events]
            while worker.primary[events] < before + 4:  # two of four may not cover an entry
                os.sched_yield()
    worker.leave()


def store_forever(seat: Seat, n_before: int, running: Connection) -> None:
    """Be a producer that only death stops; say so after some stores."""
    worker = Worker(seat, derive)
    i = 0
    while True:
        i += 1
        worker.store(N_ENTRIES * seat.index + i % N_ENTRIES, i)
        if i == n_before:
            running.send(i)


def die_in_a_store(seat: Seat, entry: int, value: int, running: Connection) -> None:
    """Make a store, tell nobody of it, and wait for death."""
    worker = Worker(seat, derive)
    worker.producer.begin(((0, entry),))
    worker.primary[entry] = value
    running.send(value)
    running.recv()


def consume_forever(seat: Seat, running: Connection) -> None:
    """Be a consumer that only death stops."""
    worker = Worker(seat, derive)
    worker.read(0)
    running.send(0)
    while True:
        worker.wait()
        worker.event()


def consume(seat: Seat, producers: tuple[int, ...], n_stores: int, report: Connection) -> None:
    """Be a consumer until all producers are done; look at what every event leaves."""
    worker = Worker(seat, derive)
    watched = [(p, N_ENTRIES * p + k) for p in producers for k in range(N_ENTRIES)]
    dones = [done_word(seat.plan.n, producer) for producer in producers]
    torn, lost, n_events = [], [], 0
    for _, entry in watched:
        worker.read(entry)
    report.send("ready")
    ended = False
    while not ended:
        done = dict(zip(producers, [worker.primary[at] for at in dones], strict=True))
        ended = all(d >= n_stores for d in done.values())
        covers = _every if ended else _COVERS[n_events % 3]
        worker.event(covers)
        n_events += 1
        worker.primary[events_word(seat.plan.n, seat.index)] = n_events
        for producer, entry in watched:
            store = stored(worker.read(entry))
            if store and store % N_ENTRIES != entry % N_ENTRIES:
                torn.append((entry, store))
            if covers(entry) and store < last_store(producer, entry, done[producer]):
                lost.append((entry, store, done[producer]))
    differing = [
        (entry, stored(worker.derived[entry]))
        for _, entry in watched
        if worker.derived[entry] != derive(worker.primary[entry])
    ]
    seen = Seen(
        torn[:9], lost[:9], differing, n_events, worker.n_taken, worker.n_derived, worker.n_drops
    )
    worker.leave()
    report.send(seen)


def echo(seat: Seat, n_rounds: int) -> None:
    """Answer each store to word 0 by one to word 1; sleep, never look twice."""
    worker = Worker(seat, derive)
    for i in range(1, n_rounds + 1):
        while stored(worker.read(0)) < i:
            assert worker.wait(HANG, n_polls=0), f"round {i}: not woken"
            worker.event()
        worker.store(1, i)
    worker.leave()


class Crew:
    """Processes of one test: started by spawn, ended with it."""

    def __init__(self, fabric: WorkerFabric) -> None:
        self.fabric = fabric
        self.processes: list[BaseProcess] = []

    def start(self, target: Any, index: int, *arguments: Any) -> BaseProcess:
        process = SPAWN.Process(
            target=target, args=(self.fabric.seat(index), *arguments), daemon=True
        )
        process.start()
        self.processes.append(process)
        return process

    def start_consumer(self, index: int, producers: tuple[int, ...], n_stores: int) -> Connection:
        ours, theirs = SPAWN.Pipe()
        self.start(consume, index, producers, n_stores, theirs)
        theirs.close()
        assert received(ours) == "ready"
        return ours

    def kill(self, process: BaseProcess) -> None:
        """Send SIGKILL and wait for the end."""
        process.kill()
        process.join(HANG)
        assert process.exitcode == -9

    def end(self) -> None:
        """Wait until all have ended, none by a fault."""
        for process in self.processes:
            process.join(HANG)
        codes = [process.exitcode for process in self.processes]
        assert set(codes) <= {0, -9}, codes

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def received(connection: Connection) -> Any:
    """Return what a process has sent, or fail: it does not come any more."""
    assert connection.poll(HANG), "nothing comes"
    return connection.recv()


class Number(msgspec.Struct, frozen=True, array_like=True):
    value: int
    text: str


def count(end: LineEnd, n_polls: int, report: Connection) -> None:
    """Be a receiver until -1 comes; report all that came before."""
    receiver = Receiver[Number](end, Number)
    values: list[int] = []
    while not values or values[-1] >= 0:
        assert receiver.wait(HANG, n_polls), "not woken"
        values += [message.value for message in receiver.drain()]
    receiver.close()
    report.send(values[:-1])
