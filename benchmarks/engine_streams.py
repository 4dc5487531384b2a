"""Streams of single references for the engine's rows, made the same way every time."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penumbra import guest
from penumbra.guest.workloads.workload import recorded_workload
from penumbra.hw.streams import (
    COUNT_SHIFT,
    MAX_COUNT,
    READ,
    WRITE,
    AccessStream,
    pack_runs,
)

N = 1_000_000
N_PAGES = 1 << 16
RECORDING = "recording"
STREAMS = ("seq", "lcg", "zipf", RECORDING)
_FIRST_PAGE = 1 << 16

Ints = npt.NDArray[np.int64]


@cache
def expanded(name: str) -> AccessStream:
    """Return a stream in which every run is one reference."""
    if name == RECORDING:
        coded = coded_recording()
        counts = (coded.runs >> COUNT_SHIFT) & MAX_COUNT
        single = coded.runs & ~np.int64(MAX_COUNT << COUNT_SHIFT) | np.int64(1 << COUNT_SHIFT)
        return AccessStream(coded.pages, np.repeat(single, counts), coded.salt)
    page, kind = {"seq": _seq, "lcg": _lcg, "zipf": _zipf}[name]()
    one = np.ones(N, np.int64)
    pages = np.arange(_FIRST_PAGE, _FIRST_PAGE + N_PAGES, dtype=np.int64)
    return AccessStream(pages, pack_runs(page, kind, one, 8 * one), 1)


@cache
def coded_recording() -> AccessStream:
    """Return the longest process of the shipped 64-bit recording, as recorded."""
    path = Path(guest.__path__[0]) / "recordings" / "pipeline.trace"
    return max(recorded_workload(path).streams, key=lambda stream: stream.n_references)


def _seq() -> tuple[Ints, Ints]:
    at = np.arange(N, dtype=np.int64)
    return at // 64 % N_PAGES, np.where(at & 7 == 7, WRITE, READ).astype(np.int64)


def _lcg() -> tuple[Ints, Ints]:
    """Knuth's constants, by doubling: x[k .. 2k] is an affine map of x[0 .. k]."""
    a, c, mask = 1664525, 1013904223, (1 << 32) - 1
    x = np.empty(N, np.uint64)
    x[0] = (a + c) & mask
    k, a_k, c_k = 1, a, c
    while k < N:
        n = min(k, N - k)
        x[k : k + n] = (x[:n] * np.uint64(a_k) + np.uint64(c_k)) & np.uint64(mask)
        k, a_k, c_k = 2 * k, a_k * a_k & mask, (c_k * a_k + c_k) & mask
    return (x >> np.uint64(16)).astype(np.int64) % N_PAGES, np.zeros(N, np.int64)


def _zipf() -> tuple[Ints, Ints]:
    draw = np.random.default_rng(7)
    share = np.cumsum(1.0 / np.arange(1, N_PAGES + 1) ** 0.99)
    rank = np.searchsorted(share / share[-1], draw.random(N))
    page = draw.permutation(N_PAGES)[np.minimum(rank, N_PAGES - 1)]
    return page.astype(np.int64), np.where(draw.random(N) < 0.3, WRITE, READ).astype(np.int64)
