"""How fast lackey logs become references, as a ratio to a regular expression in the same run.

    PYTHONPATH=build/ns python -P benchmarks/trace_import.py [pairs] [LOG]

The yardstick is what one would write first: a regular expression per line in a loop, its three
groups appended as numbers. Each row times pairs, the yardstick right before each sample, and prints
the median of the pairs' ratios. Without LOG, a log is made up that looks like a recorded program:
half fetches, some system calls; both sides read it from the page cache.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

from penumbra.guest.traces import import_lackey
from penumbra.guest.traces.logtext import read_blocks
from penumbra.hw.compiled import ENGINE_VARIABLE
from penumbra.hw.streams import FETCH, READ, WRITE

PAIRS = 9
N_REFERENCES = 1_000_000
_LINE = re.compile(rb"(I | [LSM]) ([0-9a-f]+),(\d+)\n")
_KINDS = {b"I ": FETCH, b" L": READ, b" S": WRITE, b" M": WRITE}


def regex_loop(path: Path) -> int:
    """Read the references of a log as columns of numbers; return how many."""
    kinds, addresses, sizes = [], [], []
    with path.open("rb") as file:
        for line in file:
            if match := _LINE.match(line):
                kinds.append(_KINDS[match[1]])
                addresses.append(int(match[2], 16))
                sizes.append(int(match[3]))
    return len(addresses)


def parse(path: Path, engine: str) -> int:
    """Read them by the importer's decoder."""
    os.environ[ENGINE_VARIABLE] = engine
    return sum(len(block.address) for block in read_blocks(path))


def whole_import(path: Path) -> int:
    """Import the log as a recording: the text, the runs, the calls, the images."""
    os.environ[ENGINE_VARIABLE] = "numba"
    return import_lackey([path]).n_references


def made_up(seed: int) -> Iterator[str]:
    """Yield the lines of a log: straight code with data references near a few places."""
    choose = random.Random(seed)
    yield "==1== Parent PID: 0"
    at, places = 0x400000, [0x1FFF000800, 0x4035000, 0x4A00000]
    for number in range(N_REFERENCES // 2):
        size = choose.randrange(1, 8)
        yield f"I  {at:08x},{size}"
        at = at + size if number % 9 else 0x400000 + choose.randrange(0x40000)
        place = choose.choice(places) + 8 * choose.randrange(64)
        yield f" {choose.choice('LLSM')} {place:08x},8"
        if number % 20_000 == 0:
            yield "SYSCALL[1,1](1) sys_write ( 1, 0x4a00000, 4 )[sync] --> Success(0x4)"


ROWS: dict[str, Callable[[Path], int]] = {
    "text, compiled": lambda path: parse(path, "numba"),
    "text, numpy": lambda path: parse(path, "plain"),
    "whole import, compiled": whole_import,
}


def main(arguments: list[str]) -> int:
    """Print one line per row: ratio to the regular expression, its range, references a second."""
    n_pairs = int(arguments[0]) if arguments else PAIRS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments[1]) if arguments[1:] else Path(folder) / "log"
        if not arguments[1:]:
            path.write_text("\n".join([*made_up(1), ""]), newline="\n")
        _measure(path, n_pairs)
    return 0


def _measure(path: Path, n_pairs: int) -> None:
    for row in ROWS.values():
        row(path)  # compiles, and reads the log into the page cache
    samples: dict[str, list[tuple[float, float, int]]] = {row: [] for row in ROWS}
    for _ in range(n_pairs):
        for name, row in ROWS.items():
            start = perf_counter()
            n_expected = regex_loop(path)
            between = perf_counter()
            n = row(path)
            samples[name].append((between - start, perf_counter() - between, n))
            assert n >= n_expected, "a reference was lost"  # one that crosses a page is two
    width = max(map(len, ROWS))
    sys.stdout.write(f"{'':{width}}  to regex      range   M refs/s\n")
    for name, pairs in samples.items():
        ratios = sorted(yardstick / spent for yardstick, spent, _ in pairs)
        rate = statistics.median(n / spent for _, spent, n in pairs) / 1e6
        span = f"{ratios[0]:5.1f}-{ratios[-1]:5.1f}"
        line = f"{statistics.median(ratios):7.1f}x {span:>12}  {rate:8.1f}"
        sys.stdout.write(f"{name:{width}}  {line}\n")
    slowest = [n / yardstick / 1e6 for yardstick, _, n in samples["text, numpy"]]
    rate = statistics.median(slowest)
    sys.stdout.write(f"{'regex loop':{width}}  {1:7.1f}x {'':12}  {rate:8.1f}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
