"""How long a patch takes, as a ratio to a bare trio memory-channel tell in the same run.

    PYTHONPATH=build/ns python -P benchmarks/patch_post.py [pairs]

Each row times nine pairs, a tell right before each sample, and prints the median of the pairs'
ratios: how many of what the row does fit into one tell. A row's unit is one guest store: begin,
stored, a post to one consumer, end; and, where it says so, the patch's share of the consumer's
event. The channels have 64 slots, in a matrix of 4 VCPUs, as the tell's channel has.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from time import perf_counter

import trio

from penumbra.actors.core import ATOMIC, Matrix, Order

CAPACITY = 64
N_TELLS = 4_000
N_STORES = 64 * 300
PAIRS = 9


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


def posts(order: Order, n_entries: int, drains: bool) -> float:
    """Seconds per store that posts one of `n_entries` entries to one other VCPU."""
    matrix = Matrix(4, CAPACITY, order=order)
    producer, consumer = matrix.producer(0), matrix.consumer(1)
    keys = [(0x1000, 8 * entry) for entry in range(n_entries)]
    spent = 0.0
    for _ in range(N_STORES // CAPACITY):
        start = perf_counter()
        for i in range(CAPACITY):
            entry = keys[i % n_entries]
            producer.begin((entry,))
            producer.stored()
            producer.post_nowait(1, *entry, 5, 4)
            producer.end()
        if drains:
            consumer.event()
        spent += perf_counter() - start
        if not drains:
            consumer.event()
    return spent / N_STORES


def idle_events() -> float:
    """Seconds per event that finds nothing, in a matrix of 4."""
    consumer = Matrix(4, CAPACITY).consumer(0)
    start = perf_counter()
    for _ in range(N_STORES):
        consumer.event()
    return (perf_counter() - start) / N_STORES


ROWS: dict[str, Callable[[], float]] = {
    "store + new patch": lambda: posts(Order.CORRECT, 64, drains=False),
    "store + new patch, drained": lambda: posts(Order.CORRECT, 64, drains=True),
    "store, 8 entries, coalescing, drained": lambda: posts(Order.CORRECT, 8, drains=True),
    "atomic exits: store + new patch, drained": lambda: posts(ATOMIC, 64, drains=True),
    "atomic exits: 8 entries, coalescing, drained": lambda: posts(ATOMIC, 8, drains=True),
    "event that finds nothing": idle_events,
}


def main(arguments: list[str]) -> int:
    """Print one line per row: ratio to a tell, its range over the pairs, microseconds."""
    n_pairs = int(arguments[0]) if arguments else PAIRS
    samples: dict[str, list[tuple[float, float]]] = {row: [] for row in ROWS}
    for _ in range(n_pairs):
        for row, measure in ROWS.items():
            samples[row].append((tell(), measure()))
    width = max(map(len, ROWS))
    sys.stdout.write(f"{'':{width}}  per tell      range       us\n")
    for row, pairs in samples.items():
        ratios = sorted(told / spent for told, spent in pairs)
        spent = statistics.median(spent for _, spent in pairs) * 1e6
        line = (
            f"{statistics.median(ratios):7.1f}x  {ratios[0]:5.1f}-{ratios[-1]:5.1f}  {spent:7.2f}"
        )
        sys.stdout.write(f"{row:{width}}  {line}\n")
    told = statistics.median(told for pairs in samples.values() for told, _ in pairs) * 1e6
    sys.stdout.write(f"{'raw trio tell':{width}}  {1:7.1f}x  {'':11}  {told:7.2f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
