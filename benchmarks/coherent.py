"""What derived data cost to keep coherent, as ratios to a raw trio channel send in the same run.

    python -P benchmarks/coherent.py [--pairs N] [--json]

peek, read: of a kept value. set: of an entry that nobody derives from; of one that one worker, or
each of 8 workers, keeps a value of, so that a patch is posted to each. set + read: a change and
the read that follows it, by patching the value, and by deriving it again. Raw trio passes an object
through a bounded memory channel to a live receiver.

Each row is measured in pairs, raw trio and then the row; printed is the median of the pairs'
ratios (time per operation ÷ time per send: smaller is better) with the quartiles. Times are
processor time; they depend on the machine and its load, the ratios much less.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Awaitable, Callable
from time import process_time
from typing import TypeAlias

import anyio
import trio

from penumbra.actors.coherent import Change, Fabric, Source, View

N = 5_000
KEYS = [f"key-{number}" for number in range(64)]
Measurement: TypeAlias = Callable[[], Awaitable[float]]


async def trio_send() -> float:
    """Return the seconds of one send of an object to a live receiver."""
    sending, receiving = trio.open_memory_channel[object](64)

    async def send_all() -> None:
        async with sending:
            for number in range(N):
                await sending.send(number)

    start = process_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        async for _ in receiving:
            pass
    return (process_time() - start) / N


def make(*, patched: bool = False) -> tuple[Source[str, int], View[str, int]]:
    rows = Source("rows", dict.fromkeys(KEYS, 1))

    async def value(key: str) -> int:
        return rows[key] + 1

    def apply(_: int, change: Change) -> int:
        result: int = change.new + 1
        return result

    view = rows.view(apply=apply)(value) if patched else rows.view()(value)
    return rows, view


async def peek() -> float:
    rows, view = make()
    async with Fabric(rows):
        for key in KEYS:
            await view(key)
        start = process_time()
        for number in range(N):
            view.peek(KEYS[number & 63])
        return (process_time() - start) / N


async def read() -> float:
    rows, view = make()
    async with Fabric(rows):
        for key in KEYS:
            await view(key)
        start = process_time()
        for number in range(N):
            await view(KEYS[number & 63])
        return (process_time() - start) / N


def write(n_workers: int, n_told: int) -> Measurement:
    async def measure() -> float:
        rows, view = make(patched=True)
        fabric = Fabric(rows, workers=n_workers, capacity=64)
        async with fabric:
            for worker in fabric.workers[:n_told]:
                for key in KEYS:
                    await view.at(worker)(key)
            start = process_time()
            for number in range(N):
                rows.set(KEYS[number & 63], number)
                if number & 63 == 63:  # the workers' turn: what they apply is part of the price
                    await anyio.lowlevel.checkpoint()
            return (process_time() - start) / N

    return measure


def change_and_read(*, patched: bool) -> Measurement:
    async def measure() -> float:
        rows, view = make(patched=patched)
        async with Fabric(rows):
            for key in KEYS:
                await view(key)
            start = process_time()
            for number in range(N):
                rows.set(KEYS[number & 63], number)
                await view(KEYS[number & 63])
            return (process_time() - start) / N

    return measure


ROWS: dict[str, Measurement] = {
    "peek, kept": peek,
    "read, kept": read,
    "set, told to nobody": write(1, 0),
    "set, told to 1 worker of 1": write(1, 1),
    "set, told to 1 worker of 8": write(8, 1),
    "set, told to 8 workers of 8, per worker": write(8, 8),
    "set + read, value patched": change_and_read(patched=True),
    "set + read, derived again": change_and_read(patched=False),
}
PER = {"set, told to 8 workers of 8, per worker": 8}


def seconds(measurement: Measurement, loop: str) -> float:
    gc.collect()
    return anyio.run(measurement, backend=loop)


def measure(n_pairs: int, loop: str) -> dict[str, list[float]]:
    ratios: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(n_pairs):
        for name, row in ROWS.items():
            raw = seconds(trio_send, "trio")
            ratios[name].append(seconds(row, loop) / PER.get(name, 1) / raw)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of derived data kept coherent, ÷ raw trio.")
    parser.add_argument("--pairs", type=int, default=9, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table = {loop: measure(options.pairs, loop) for loop in ("trio", "asyncio")}
    if options.json:
        json.dump(table, sys.stdout)
        return
    for loop, rows in table.items():
        sys.stdout.write(f"{loop}: time per operation ÷ one raw trio channel send\n")
        for name, ratios in rows.items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            sys.stdout.write(f"  {name:<42} {middle:6.2f}   ({low:.2f} .. {high:.2f})\n")


if __name__ == "__main__":
    main()
