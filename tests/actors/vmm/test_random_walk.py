"""Two VCPUs, a handful of table entries, random stores, events and accesses: no access is refused.

The guest keeps none of its flushing duties, on purpose: the oracle allows exactly what hardware may
do with such a guest. Tables are shared, recursive, used as data, made of large pages, overwritten
whole. After each step every invariant is asserted.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import (
    CR0_WP,
    CR4_PGE,
    IA32,
    NX,
    PAE,
    PS,
    X86_64,
    A,
    D,
    FormatSpec,
    G,
    P,
    U,
    W,
)
from penumbra.hw.operations import Fill
from penumbra.hw.streams import FETCH, READ, WRITE

from .bench import (
    CR4,
    LINK,
    PROTECTED,
    USED,
    Bench,
    out_of_sync,
    patch,
    shootdown,
    write_buffer,
)

Step = tuple[str, int, int, int]
TOO_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

N_FRAMES = 24
ROOTS = (1, 2)
TABLES = (4, 5)
WINDOW_TABLE = 6
DATA = (8, 9, 10, 11)


@dataclass(frozen=True)
class World:
    """The entries that change, what they may become, and the addresses that are used.

    Attributes:
        choices: (table frame, index) to the values it may hold.
        first: The entries that are set before the start.
        pages: Addresses accessed and flushed.
        window: Where the guest kernel sees all its memory, writable.
    """

    spec: FormatSpec
    choices: dict[tuple[int, int], tuple[int, ...]]
    first: dict[tuple[int, int], int]
    pages: tuple[int, ...]
    window: int


def frame(gfn: int, flags: int) -> int:
    return gfn << 12 | flags


LEAVES = (
    0,
    frame(8, USED),
    frame(9, USED),
    frame(9, P | U | A | D),
    frame(9, P | W | A | D),
    frame(9, P | W | U),
    frame(9, P | W | U | A),
    frame(10, USED | G),
    frame(4, USED),  # a table as data
    frame(1, P | W | A | D),  # a root as data
    frame(40, USED),  # no such frame
)

IA32_WORLD = World(
    IA32,
    choices={
        (1, 0): (0, frame(4, LINK), frame(5, LINK), frame(4, P | U | A), frame(0, USED | PS)),
        (1, 1): (0, frame(4, LINK), frame(4, P | W | U), frame(1, LINK), frame(0x400, USED | PS)),
        (2, 0): (0, frame(4, LINK), frame(5, LINK), frame(0, P | W | U | A | PS | G)),
        (4, 0): LEAVES,
        (4, 1): LEAVES,
        (5, 0): LEAVES,
        (5, 1): (0, frame(11, USED)),
    },
    first={
        (1, 0): frame(4, LINK),
        (1, 1): frame(4, LINK),
        (2, 0): frame(5, LINK),
        (4, 0): frame(8, USED),
        (4, 1): frame(9, USED),
        (5, 0): frame(10, USED),
        (1, 3): frame(WINDOW_TABLE, LINK),
        (2, 3): frame(WINDOW_TABLE, LINK),
    },
    pages=(0x0, 0x1000, 0x40_0000, 0x40_1000),
    window=0xC0_0000,
)

# 12 is the level 2 table of both roots, 13 a level 1 table reached by two of its entries.
X86_64_WORLD = World(
    X86_64,
    choices={
        (1, 0): (0, frame(12, LINK), frame(12, P | U | A), frame(1, LINK)),
        (1, 1): (0, frame(12, LINK)),
        (2, 0): (0, frame(12, LINK), frame(12, LINK | NX)),
        (12, 0): (0, frame(13, LINK), frame(13, P | W | A), frame(0, USED | PS)),
        (12, 1): (0, frame(13, LINK)),
        (13, 0): (0, frame(4, LINK), frame(5, LINK), frame(0, USED | PS), frame(0, USED | PS | NX)),
        (13, 1): (0, frame(4, LINK), frame(0x200, USED | PS)),
        (4, 0): (*LEAVES, frame(8, USED | NX)),
        (4, 1): LEAVES,
        (5, 0): LEAVES,
    },
    first={
        (1, 0): frame(12, LINK),
        (1, 1): frame(12, LINK),
        (2, 0): frame(12, LINK),
        (12, 0): frame(13, LINK),
        (12, 1): frame(13, LINK),
        (13, 0): frame(4, LINK),
        (13, 1): frame(5, LINK),
        (4, 0): frame(8, USED),
        (4, 1): frame(9, USED),
        (5, 0): frame(10, USED),
        (1, 511): frame(14, LINK),
        (2, 511): frame(14, LINK),
        (14, 0): frame(15, LINK),
        (15, 0): frame(WINDOW_TABLE, LINK),
    },
    pages=(0x0, 0x1000, 0x20_0000, 0x4000_0000, 0x80_0000_0000, 0x80_4000_1000),
    window=0xFFFF_FF80_0000_0000,
)
# 12 and 13 are directories; what an entry of a root becomes may be refused at the next load.
PAE_WORLD = World(
    PAE,
    choices={
        (1, 0): (0, frame(12, P), frame(13, P), frame(1, P), frame(12, P | W)),
        (1, 1): (0, frame(12, P), frame(13, P)),
        (2, 0): (0, frame(12, P), frame(13, P), frame(40, P)),
        (12, 0): (0, frame(4, LINK), frame(5, LINK), frame(4, P | W | A), frame(0, USED | PS)),
        (12, 1): (0, frame(4, LINK | NX), frame(0x200, USED | PS), frame(0, USED | PS | G)),
        (13, 0): (0, frame(5, LINK), frame(13, LINK), frame(1, LINK)),
        (4, 0): (*LEAVES, frame(8, USED | NX)),
        (4, 1): LEAVES,
        (5, 0): LEAVES,
    },
    first={
        (1, 0): frame(12, P),
        (1, 1): frame(13, P),
        (2, 0): frame(13, P),
        (12, 0): frame(4, LINK),
        (12, 1): frame(5, LINK),
        (13, 0): frame(5, LINK),
        (4, 0): frame(8, USED),
        (4, 1): frame(9, USED),
        (5, 0): frame(10, USED),
        (1, 3): frame(14, P),
        (2, 3): frame(14, P),
        (14, 0): frame(WINDOW_TABLE, LINK),
    },
    pages=(0x0, 0x1000, 0x20_0000, 0x4000_0000, 0x4000_1000),
    window=0xC000_0000,
)
WORLDS = {"ia32": IA32_WORLD, "pae": PAE_WORLD, "x86-64": X86_64_WORLD}


def one_shadow(scheme: Scheme) -> Scheme:
    return msgspec.structs.replace(scheme, shadow="shared")


SCHEMES = {
    "shootdown": shootdown(),
    "shootdown, told at all": shootdown(tell_all=True, flood=3),
    "patch": patch(),
    "patch, invalidating": patch("invalidate"),
    "patch, one slot": patch(capacity=1),
    "patch, two slots, invalidating": patch("invalidate", capacity=2, flood=2),
    "patch, told at all, four slots": patch(tell_all=True, capacity=4),
    "write buffer": write_buffer(),
    "write buffer, one record, one slot": write_buffer(records=1, combines=False, capacity=1),
    "write buffer, all marked, losing": write_buffer(
        records=3, marks="writable", overflow="lost", flood=3
    ),
    "write buffer, shot down": write_buffer("shootdown", records=2, overflow="lost"),
    "write buffer, told at all": write_buffer(tell_all=True, marks="writable", records=4),
    "one locked channel, waiting": patch(channels="shared", capacity=2, overflow="wait"),
    "a channel per producer, dropping": patch(channels="per-producer", capacity=2, overflow="lost"),
    "a channel per consumer, stored": patch(
        channels="per-consumer", postpone="store", stale="invalidate"
    ),
    "one shadow": one_shadow(patch()),
    "one shadow, one slot": one_shadow(patch(capacity=1, overflow="lost")),
    "one shadow, a locked channel": one_shadow(patch("invalidate", channels="shared", capacity=4)),
    "one shadow, shot down": one_shadow(shootdown(flood=3)),
    "patch, fetching ahead": patch(prefetch=4, prefetch_invlpg=True),
    "shootdown, fetching ahead": shootdown(prefetch=512, prefetch_invlpg=True),
    "patch, nothing shared, no previous root": patch(share_roles=False, capacity=2, root_cache=0),
    "out of sync": out_of_sync(),
    "out of sync, two tables": out_of_sync(unsync=2, apply="invalidate"),
    "out of sync, patches above": out_of_sync("patch", prefetch=8, prefetch_invlpg=True),
    "out of sync, nothing shared, one previous root": out_of_sync(
        "patch", "invalidate", share_roles=False, root_cache=1
    ),
}


def steps() -> st.SearchStrategy[list[Step]]:
    vcpu, number = st.integers(0, 1), st.integers(0, 1 << 10)
    kinds = [
        "store",
        "store",
        "store",
        "poke",
        "byte",
        "pair",
        "invlpg",
        "cr3",
        "wp",
        "cr4",
        "fill",
    ]
    return st.lists(
        st.tuples(st.sampled_from(["access"] * 8 + kinds), vcpu, number, number),
        min_size=20,
        max_size=80,
    )


def walk_of(world: str, scheme: str, *, software: bool = False) -> Walk:
    """Return a walk on a bench of traced shadow tables."""
    place = WORLDS[world]
    bench = Bench(place.spec, SCHEMES[scheme], n_frames=N_FRAMES, software=software)
    return Walk(place, bench)


class Walk:
    """One guest on one bench, which has `N_FRAMES` guest frames."""

    def __init__(self, world: World, bench: Bench) -> None:
        self.world = world
        self.bench = bench
        width = world.spec.entry_bytes
        for (table, index), value in world.first.items():
            bench.memory.store(table << 12 | index * width, width, value)
        for gfn in range(N_FRAMES):
            at = WINDOW_TABLE << 12 | gfn * width
            bench.memory.store(at, width, frame(gfn, P | W | A | D))
        bench.start(*ROOTS)

    def step(self, what: str, vcpu: int, first: int, second: int) -> None:
        world, bench = self.world, self.bench
        page = world.pages[first % len(world.pages)]
        table, index = list(world.choices)[first % len(world.choices)]
        values = world.choices[table, index]
        value, width = values[second % len(values)], world.spec.entry_bytes
        gpa = table << 12 | index * width
        if what == "access":
            kind = (READ, WRITE, FETCH)[second % 3]
            bench.access(vcpu, page + 0x20, kind, user=second & 8 == 0)
        elif what == "store":
            bench.store(vcpu, world.window + gpa, value)
        elif what == "poke":
            bench.poke(vcpu, gpa, value)
        elif what == "byte":
            bench.store(vcpu, world.window + gpa, value & 0xFF, size=1)
        elif what == "pair":
            bench.store(vcpu, world.window + gpa - 2, value & 0xFFFF_FFFF, size=4)
        elif what == "invlpg":
            bench.invlpg(vcpu, page)
        elif what == "cr3":
            bench.load_cr3(vcpu, ROOTS[first & 1])
        elif what == "wp":
            bench.load_cr0(vcpu, PROTECTED ^ (CR0_WP if first & 1 else 0))
        elif what == "cr4":
            whole = CR4[world.spec.name]
            bench.load_cr4(vcpu, whole ^ (CR4_PGE if first & 1 else 0))
        elif what == "fill":
            gfn = (*TABLES, *DATA)[first % 6]
            bench.do(vcpu, Fill(world.window + (gfn << 12), 4096, 0))


@pytest.mark.shows("V2", "V5", "V6", "P3", "P4", "P5", "P10", "W1", "W2", "W3", "W5", "W6")
@pytest.mark.parametrize(
    ("world", "scheme"), [(world, scheme) for world in WORLDS for scheme in SCHEMES]
)
@settings(max_examples=16, deadline=None, suppress_health_check=TOO_SLOW)
@given(script=steps())
def test_whatever_a_guest_does_no_access_is_refused(
    world: str, scheme: str, script: list[Step]
) -> None:
    place = WORLDS[world]
    walk = Walk(place, Bench(place.spec, SCHEMES[scheme], n_frames=N_FRAMES))
    for what, vcpu, first, second in script:
        walk.step(what, vcpu, first, second)
        walk.bench.assert_coherent()


@pytest.mark.shows("H12", "V5", "P4", "P5", "A40 Fig. 8: 816", "A40 Fig. 12: 876")
@pytest.mark.parametrize("scheme", ["shootdown", "patch", "patch, invalidating", "patch, one slot"])
@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=20, deadline=None, suppress_health_check=TOO_SLOW)
@given(script=steps())
def test_whatever_a_guest_does_no_access_is_refused_where_the_monitor_fills_the_tlb(
    world: str, scheme: str, script: list[Step]
) -> None:
    walk = walk_of(world, scheme, software=True)
    for what, vcpu, first, second in script:
        walk.step(what, vcpu, first, second)
        walk.bench.assert_coherent()
