"""The compiled and the plain engine are one machine: equal in every bit they leave behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import mmu_layout as m
from penumbra.hw import operations as o
from penumbra.hw.exits import Exit, PageFault
from penumbra.hw.formats import IA32, X86_64, FormatSpec
from penumbra.hw.streams import AccessStream, pack_runs
from penumbra.hw.tlb import TlbGeometry

from .rig import ENGINES, NX, PAGE, PS, A, D, G, P, Rig, U, W

N_FRAMES, N_TABLES = 24, 8
N_RUNS, SALT = 40, 9
SPECS = [IA32, X86_64]


class Twin:
    """A machine full of random entries, made from a seed, and all that it reports."""

    def __init__(self, spec: FormatSpec, engine: str, seed: int) -> None:
        dice = random.Random(seed)
        stream = random_stream(dice)
        ways, slots = dice.choice([1, 2, 4]), dice.choice([0, 1, 4])
        geometry = TlbGeometry(ways * dice.choice([1, 4]), ways, slots)
        self.rig = Rig(spec, engine, n_frames=N_FRAMES, geometry=geometry, streams=[stream])
        self.cpu = self.rig.cpu
        for table in range(N_TABLES):
            for index in range(8):
                at = table * PAGE + index * spec.entry_bytes
                self.rig.set_word(at, random_entry(dice, spec, table % len(spec.levels)))
        for pfn in range(N_TABLES, N_FRAMES):
            self.rig.ram.flags[pfn] = dice.random() < 0.2
        self.log: list[Any] = []
        self.cpu.on_used = lambda *access: self.log.append(access)
        self.cpu.on_flagged = lambda *store: self.log.append(store)
        self.cpu.on_block = lambda _id, _runs, at, used: self.log.append((at, used.tolist()))
        self.cpu.load_root(spec.top * PAGE)

    def run(self, work: o.Operation, user: bool) -> Exit:
        """Run once, and once more from where it stopped."""
        stop = self.cpu.run(work, user)
        if isinstance(stop, PageFault) and stop.at:
            stop = self.cpu.run(work, user, stop.at)
        return stop

    def state(self) -> dict[str, Any]:
        rig = self.rig
        rig.tlb.check()
        return {
            "registers": self.cpu.reg.tolist(),
            "tlb": rig.tlb.array.tolist(),
            "log": self.log,
            "ram": bytes(rig.ram.bytes),
        }


def random_entry(dice: random.Random, spec: FormatSpec, level: int) -> int:
    """Make an entry for a table of `level`; table t is used at level t modulo the levels."""
    n = len(spec.levels)
    pfn = dice.randrange(N_TABLES, N_FRAMES + 1)
    if level:
        pfn = dice.randrange(N_TABLES // n) * n + level - 1
    flags = P | A
    for bit, chance in ((W, 0.8), (U, 0.85), (A, 0.5), (D, 0.3), (G, 0.3)):
        flags ^= bit if dice.random() < chance else 0
    if level and dice.random() < 0.15:
        pfn, flags = 0, flags | PS
    if spec is X86_64 and dice.random() < 0.15:
        flags |= NX
    if dice.random() < 0.03:
        flags ^= 1 << dice.randrange(8 * spec.entry_bytes)
    return pfn << 12 | flags if dice.random() < 0.97 else dice.getrandbits(8 * spec.entry_bytes)


def random_stream(dice: random.Random) -> AccessStream:
    columns = [
        (dice.randrange(8), dice.randrange(3), dice.randrange(1, 20), dice.randrange(4096))
        for _ in range(N_RUNS)
    ]
    return AccessStream(np.arange(8), pack_runs(*np.array(columns, np.int64).T), SALT)


values = st.integers(0, (1 << 64) - 1)
sizes = st.sampled_from([1, 2, 4, 8])
Act = Callable[[Twin], Any]


def gvas(spec: FormatSpec) -> st.SearchStrategy[int]:
    """Return addresses that use the first entries of every level, and any others."""
    digits = st.lists(st.integers(0, 7), min_size=len(spec.levels), max_size=len(spec.levels))
    near = st.builds(
        lambda indices, offset: (
            sum(index << level.shift for index, level in zip(indices, spec.levels, strict=True))
            | offset
        ),
        digits,
        st.integers(0, 4095),
    )
    return st.one_of(*[near] * 8, st.integers(0, (1 << (32 if spec is IA32 else 64)) - 1))


def operations(spec: FormatSpec) -> st.SearchStrategy[o.Operation]:
    gva = gvas(spec)
    words = gva.map(lambda at: at & ~7)
    n_bytes = st.integers(0, 700).map(lambda n: 8 * n)
    runs = st.integers(0, N_RUNS)
    return st.one_of(
        st.builds(o.Load, gva, sizes),
        st.builds(o.Store, gva, sizes, values),
        st.builds(o.Exchange, gva, sizes, values),
        st.builds(o.CompareExchange, gva, sizes, st.just(0), values),
        st.builds(o.Fill, words, n_bytes, values),
        st.builds(o.Copy, words, words, n_bytes),
        st.builds(o.SpinUntil, gva, sizes, values, st.just(0)),
        st.builds(lambda a, b: o.Block(0, min(a, b), max(a, b)), runs, runs),
    )


def acts(spec: FormatSpec) -> st.SearchStrategy[Act]:
    """Return what may happen to a machine, as functions whose answers must be equal."""

    def set_modes(wp: bool, pse: bool, pge: bool, nxe: bool, spurious: bool) -> Act:
        def act(twin: Twin) -> None:
            twin.cpu.set_modes(wp=wp, pse=pse, pge=pge, nxe=nxe)
            twin.cpu.reg[m.R_SPURIOUS] = spurious
            twin.cpu.flush_all()

        return act

    def limit(budget: int) -> Act:
        def act(twin: Twin) -> None:
            twin.cpu.reg[m.R_LIMIT] = twin.cpu.reg[m.R_PROGRESS] + budget

        return act

    gva, b = gvas(spec), st.booleans()
    n = len(spec.levels)
    roots = st.one_of(
        st.integers(1, N_TABLES // n).map(lambda i: i * n - 1), st.integers(0, N_TABLES)
    )
    runs = st.builds(lambda work, user: lambda twin: twin.run(work, user), operations(spec), b)
    accesses = st.builds(
        lambda at, kind, user: lambda twin: twin.rig.access(at, kind, user),
        gva, st.integers(0, 2), b,
    )  # fmt: skip
    rest = st.one_of(
        gva.map(lambda at: lambda twin: twin.cpu.invlpg(at)),
        roots.map(lambda pfn: lambda twin: twin.cpu.load_root(pfn * PAGE)),
        st.just(lambda twin: twin.cpu.flush_all()),
        st.builds(set_modes, b, b, b, b, b),
        st.integers(0, 100).map(limit),
    )
    # Wrapped, or `one_of` would flatten `rest` and give it half of all acts.
    return st.one_of(runs, runs, accesses, accesses, st.builds(lambda act: act, rest))


@pytest.mark.shows("H2", "H3", "H4", "H5")
@pytest.mark.skipif("numba" not in ENGINES, reason="there is only one engine without numba")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_any_program_leaves_both_engines_equal_in_every_bit(spec: FormatSpec) -> None:
    @settings(deadline=None, max_examples=150)
    @given(seed=st.integers(0, 2**32), program=st.lists(acts(spec), min_size=1, max_size=25))
    def run(seed: int, program: list[Act]) -> None:
        twins = [Twin(spec, engine, seed) for engine in ENGINES]
        for act in program:
            plain, compiled = (act(twin) for twin in twins)
            assert plain == compiled
        plain, compiled = (twin.state() for twin in twins)
        assert plain == compiled

    run()
