"""The random guests of `tests/actors/vmm/test_random_walk.py` under virtual TLBs of every kind.

They change tables and flush when they like: the oracle allows exactly what hardware may do with
such a guest. Modes change as well, and two VCPUs may share hierarchies. After each step the
invariants of every part hold.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw.formats import CR4_PGE, CR4_PSE, IA32
from tests.actors.vmm.bench import PROTECTED
from tests.actors.vmm.test_random_walk import N_FRAMES, TOO_SLOW, WORLDS, Step, Walk
from tests.actors.vmm.vtlb.bench import VtlbBench

KINDS: dict[str, dict[str, Any]] = {
    "lazy": {},
    "eager": {"fill": "eager"},
    "drops all": {"drop": "all"},
    "one level per fault": {"levels": "one"},
    "prefetching": {"prefetch": 3},
    "working set": {"working_set": 2},
    "working set, eager": {"working_set": 1, "fill": "eager"},
    "shared": {"sharing": "vm"},
    "shared, eager": {"sharing": "vm", "fill": "eager"},
    "shared, one level, prefetching": {"sharing": "vm", "levels": "one", "prefetch": 8},
}


def steps() -> st.SearchStrategy[list[Step]]:
    vcpu, number = st.integers(0, 1), st.integers(0, 1 << 10)
    kinds = ["store"] * 3 + ["poke", "byte", "invlpg", "cr3", "wp", "cr4", "same cr3", "paging"]
    return st.lists(
        st.tuples(st.sampled_from(["access"] * 10 + kinds), vcpu, number, number),
        min_size=20,
        max_size=80,
    )


class ModalWalk(Walk):
    """A guest that changes modes, too, and has all its VCPUs on one root to begin with."""

    def step(self, what: str, vcpu: int, first: int, second: int) -> None:
        bench, spec = self.bench, self.world.spec
        registers = bench.submms[vcpu].registers
        if what == "cr4":
            bit = CR4_PSE if spec is IA32 and first & 1 else CR4_PGE
            bench.load_cr4(vcpu, registers.cr4 ^ bit)
        elif what == "same cr3":
            bench.load_cr3(vcpu, registers.cr3 >> 12)
        elif what == "paging":  # off and on again: nothing may be left
            bench.load_cr0(vcpu, 1)
            bench.load_cr0(vcpu, PROTECTED)
        else:
            super().step(what, vcpu, first, second)


@pytest.mark.shows("I1", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I11", "I12")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=25, deadline=None, suppress_health_check=TOO_SLOW)
@given(script=steps())
def test_whatever_a_guest_does_no_access_is_refused(
    world: str, kind: str, script: list[Step]
) -> None:
    place = WORLDS[world]
    bench = VtlbBench(place.spec, n_vcpus=2, n_frames=N_FRAMES, **KINDS[kind])
    walk = ModalWalk(place, bench)
    for what, vcpu, first, second in script:
        walk.step(what, vcpu, first, second)
        bench.assert_coherent()
