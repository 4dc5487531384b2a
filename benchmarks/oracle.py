"""How fast the oracle checks: runs per second, as ratios to the plain gather it cannot do without.

    PYTHONPATH=build/ns python -P benchmarks/oracle.py [--json]

Streams are synthetic: `n_pages` pages under one root, uniformly drawn. `known` checks runs whose
cells are known, in blocks of several sizes; `first` is the first touch of each page (the walk and
what is remembered of it); `stores` changes one entry between blocks; `switches` changes the root.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from penumbra.actors.check import Oracle

_N_PAGES = 20_000
_FIRST_DATA = 1024
_N_FRAMES = _FIRST_DATA + _N_PAGES + 8
_ENTRY = 0x67
_ROOTS = (1, 2)
_MAX_BLOCKS = 4000
_BLOCKS = (16, 256, 4096, 65536)
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """What the oracle needs of an access stream."""

    pages: _Ints
    runs: _Ints


class Guest:
    """Two roots, each mapping the pages 0 .. _N_PAGES by tables of its own to the same frames."""

    def __init__(self) -> None:
        self.ram = bytearray(_N_FRAMES << 12)
        self.flags = np.zeros(_N_FRAMES, np.uint8)
        self._words = memoryview(self.ram).cast("I")
        for root in _ROOTS:
            for page in range(_N_PAGES):
                table = 8 + 64 * root + page // 1024
                self._words[root << 10 | page // 1024] = table << 12 | _ENTRY
                self._words[table << 10 | page % 1024] = (_FIRST_DATA + page) << 12 | _ENTRY
        self.oracle = Oracle("ia32", 1, memoryview(self.ram), self.flags)
        for gfn in range(_N_FRAMES):
            self.oracle.grant(gfn, gfn)
        self.oracle.registers(0, 1 << 31 | 1, _ROOTS[0] << 12, 0, 0)

    def store(self, page: int, value: int) -> None:
        """Store to the leaf entry of a page under the first root."""
        word = (8 + 64 * _ROOTS[0] + page // 1024) << 10 | page % 1024
        old, self._words[word] = self._words[word], value
        self.oracle.store(word * 4, 4, old, value)


def make_stream(n_runs: int, seed: int = 1) -> tuple[Stream, _Ints]:
    """Return a stream and the machine frame each of its runs uses."""
    draw = np.random.default_rng(seed)
    page = draw.integers(0, _N_PAGES, n_runs)
    kind = draw.integers(0, 3, n_runs)
    runs = page << 40 | np.int64(16) << 14 | kind
    return Stream(np.arange(_N_PAGES), runs.astype(np.int64)), page + _FIRST_DATA


def seconds(work: Callable[[], object]) -> float:
    """Return the least CPU time of three goes."""
    times = []
    for _ in range(3):
        before = time.process_time()
        work()
        times.append(time.process_time() - before)
    return min(times)


def measure(n_runs: int) -> dict[str, float]:
    """Return microseconds or million runs per second, by case."""
    found: dict[str, float] = {}
    stream, used = make_stream(n_runs)
    guest = Guest()
    before = time.process_time()
    every = Stream(stream.pages, np.arange(_N_PAGES) << 40 | np.int64(1) << 14)
    guest.oracle.block(0, 1, every, 0, every.pages + _FIRST_DATA)
    found["first: us per page"] = (time.process_time() - before) / _N_PAGES * 1e6

    guest.oracle.block(0, 0, stream, 0, used)
    cells = stream.runs >> 38
    frames = np.zeros(4 * _N_PAGES + 4, np.int64)
    bare = seconds(lambda: bool((frames[cells] != used).any()))
    found["bare gather and compare: Mruns/s"] = n_runs / bare / 1e6
    for size in _BLOCKS:
        n_blocks = min(n_runs // size, _MAX_BLOCKS)
        spent = seconds(partial(_blocks, guest, stream, used, size, n_blocks))
        found[f"known, blocks of {size}: Mruns/s"] = n_blocks * size / spent / 1e6
        found[f"known, blocks of {size}: us per block"] = spent / n_blocks * 1e6
    found["stores: us per store with its page"] = _stores(guest, stream, used) * 1e6
    found["switches: us per root and block of 16"] = _switches(guest, stream, used) * 1e6
    found["used, known: us"] = _used(guest) * 1e6
    verdict = guest.oracle.verdict()
    assert verdict.coherent, verdict.explain()
    return found


def _blocks(guest: Guest, stream: Stream, used: _Ints, size: int, n_blocks: int) -> None:
    for start in range(0, n_blocks * size, size):
        guest.oracle.block(0, 0, stream, start, used[start : start + size])


def _stores(guest: Guest, stream: Stream, used: _Ints) -> float:
    n = 2000
    before = time.process_time()
    for turn in range(n):
        page = int(used[turn]) - _FIRST_DATA
        guest.store(page, (page + _FIRST_DATA) << 12 | _ENTRY | (turn & 1) << 9)
        guest.oracle.event(0, "INVLPG", page << 12)
        guest.oracle.block(0, 0, stream, turn, used[turn : turn + 1])
    return (time.process_time() - before) / n


def _switches(guest: Guest, stream: Stream, used: _Ints) -> float:
    n = 2000
    before = time.process_time()
    for turn in range(n):
        guest.oracle.event(0, "CR3", _ROOTS[turn & 1] << 12)
        guest.oracle.block(0, 0, stream, 0, used[:16])
    return (time.process_time() - before) / n


def _used(guest: Guest) -> float:
    n = 20000
    before = time.process_time()
    for _ in range(n):
        guest.oracle.used(0, 0x1000, 0, True, _FIRST_DATA + 1)
    return (time.process_time() - before) / n


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--runs", type=int, default=1 << 19)
    chosen = arguments.parse_args()
    found = measure(chosen.runs)
    if chosen.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    for name, value in found.items():
        sys.stdout.write(f"{value:12.2f}  {name}\n")


if __name__ == "__main__":
    main()
