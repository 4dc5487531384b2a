"""Patches: one guest store in, patches out, by the full step order P1-P9 and C1-C9 unfenced.

A post's unit is one guest store: begin, stored, post to one consumer, end; the store itself is the
caller's. 64 live entries: all 64 slots of the channel hold a patch, so every post coalesces.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import process_time

import numpy as np
import raw
from harness import Kind, Line, Row, Sampler, Side, Summary, Unavailable, pair, sides

from penumbra.actors.core import ATOMIC, Consumer, Layout, Matrix, Order, Producer
from penumbra.actors.core.batch import Batch

CAPACITY, N_VCPUS = 64, 4
ENTRIES = [(0x1000, 8 * entry) for entry in range(CAPACITY)]
N_ROUNDS = 100
N_CALLS = 300


def store_all(producer: Producer, consumer: int) -> None:
    """Make one store to each of the 64 entries, told to one consumer."""
    begin, stored, post, end = producer.begin, producer.stored, producer.post_nowait, producer.end
    for entry in ENTRIES:
        begin((entry,))
        stored()
        post(consumer, entry[0], entry[1], 5, 4)
        end()


def coalescing(order: Order = Order.CORRECT) -> float:
    """Seconds per store whose patch is already in the channel."""
    producer = Matrix(N_VCPUS, CAPACITY, order=order).producer(0)
    store_all(producer, 1)
    start = process_time()
    for _ in range(N_ROUNDS):
        store_all(producer, 1)
    return (process_time() - start) / (N_ROUNDS * CAPACITY)


def drained(order: Order = Order.CORRECT) -> float:
    """Seconds per store whose patch is new, its share of the consumer's event included."""
    matrix = Matrix(N_VCPUS, CAPACITY, order=order)
    producer, consumer = matrix.producer(0), matrix.consumer(1)
    start = process_time()
    for _ in range(N_ROUNDS):
        store_all(producer, 1)
        consumer.event()
    return (process_time() - start) / (N_ROUNDS * CAPACITY)


@contextmanager
def batch(n: int) -> Iterator[Sampler]:
    """Stores of `n` entries a call by compiled code, each told to one consumer; 64 are live."""
    if importlib.util.find_spec("numba") is None:
        raise Unavailable("numba is not installed (extra `fast`)")
    matrix = Matrix(N_VCPUS, CAPACITY, Layout(N_VCPUS, CAPACITY).new_array())
    producer = Batch(matrix.producer(0), "numba")
    primary = np.zeros(CAPACITY, np.int64)
    at = np.arange(n, dtype=np.int64) % CAPACITY
    values = np.arange(n, dtype=np.int64)
    count = matrix.count

    def stores() -> float:
        start = process_time()
        for _ in range(N_CALLS):
            producer.post_batch(1, primary, at, values, 0x1000, at, values, count)
        return (process_time() - start) / (N_CALLS * n)

    stores()  # compiles, and fills the channel
    yield pair(raw.tell, stores)


# ---- growth --------------------------------------------------------------------------------------


def grown_post(n_vcpus: int, capacity: int, n_told: int) -> Side:
    """Return a side: seconds per consumer told of stores, the channels coalescing."""

    def posts(producer: Producer) -> None:
        begin, stored, end = producer.begin, producer.stored, producer.end
        everyone = (1 << n_told + 1) - 2
        for entry in ENTRIES[:16]:
            begin((entry,))
            stored()
            producer.post_all(everyone, *entry, 5, 4)
            end()

    producer = Matrix(n_vcpus, capacity).producer(0)
    posts(producer)
    n_rounds = max(8, 400 // n_told)

    def side() -> float:
        start = process_time()
        for _ in range(n_rounds):
            posts(producer)
        return (process_time() - start) / (n_rounds * 16 * n_told)

    return side


def grown_event(n_vcpus: int, capacity: int) -> Side:
    """Return a side: seconds per patch of events that find 16 of them."""
    matrix = Matrix(n_vcpus, capacity)
    producer, consumer = matrix.producer(0), matrix.consumer(1)

    def side() -> float:
        spent = 0.0
        for _ in range(200):
            for base, offset in ENTRIES[:16]:
                producer.begin(((base, offset),))
                producer.stored()
                producer.post_nowait(1, base, offset, 5, 4)
                producer.end()
            spent += _event(consumer)
        return spent / (200 * 16)

    return side


def _event(consumer: Consumer) -> float:
    start = process_time()
    patches = consumer.event().patches
    took = process_time() - start
    assert len(patches) == 16
    return took


@contextmanager
def opened(
    make: partial[Side], small: tuple[int, ...], large: tuple[int, ...]
) -> Iterator[Sampler]:
    yield pair(make(*small), make(*large))


def growth(name: str, what: str, make: partial[Side], sizes: list[tuple[int, ...]]) -> list[Line]:
    """Return a row for each size against the smallest, and their worst."""
    small, *larger = sizes
    rows: list[Line] = []
    for size in larger:
        text = f"{what}: {_size(size)} ÷ {_size(small)}"
        row_name = f"patches/{name}-{'x'.join(map(str, size))}"
        rows.append(Row(row_name, text, Kind.TIME, None, partial(opened, make, small, size)))
    of = tuple(row.name for row in rows)
    rows.append(Summary(f"patches/{name}", f"{what}: the worst size", Kind.TIME, 1.3, of))
    return rows


def _size(size: tuple[int, ...]) -> str:
    told = f", {size[2]} told" if len(size) > 2 else ""
    return f"{size[0]} VCPUs, {size[1]} slots{told}"


VCPUS = (2, 8, 64)
CAPACITIES = (16, 256, 4096)

LINES: tuple[Line, ...] = (
    Row("patches/post", "store told to one consumer, 64 live entries coalescing ÷ raw trio channel",
        Kind.SPEED, 9.0, sides(raw.tell, coalescing), stretch=25.0),
    Row("patches/post-atomic", "the same where exits are atomic",
        Kind.SPEED, None, sides(raw.tell, partial(coalescing, ATOMIC))),
    Row("patches/post-drained", "a new patch and its share of the event ÷ raw trio channel",
        Kind.SPEED, None, sides(raw.tell, drained)),
    Row("patches/batch", "the same per patch, 64 stores in one compiled call ÷ raw trio channel",
        Kind.SPEED, 50.0, partial(batch, 64)),
    Row("patches/batch-512", "512 stores in one compiled call",
        Kind.SPEED, None, partial(batch, 512)),
    *growth("grown-post-vcpus", "post per consumer told, by VCPUs, one told",
            partial(grown_post), [(n, 64, 1) for n in VCPUS]),
    *growth("grown-post-told", "post per consumer told, by VCPUs, all told",
            partial(grown_post), [(n, 64, n - 1) for n in VCPUS]),
    *growth("grown-post-capacity", "post per consumer told, by capacity",
            partial(grown_post), [(4, capacity, 1) for capacity in CAPACITIES]),
    *growth("grown-event-vcpus", "event per patch of 16, by VCPUs",
            partial(grown_event), [(n, 64) for n in VCPUS]),
    *growth("grown-event-capacity", "event per patch of 16, by capacity",
            partial(grown_event), [(4, capacity) for capacity in CAPACITIES]),
)  # fmt: skip
