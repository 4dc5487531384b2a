"""Which guest frame goes when a machine frame is needed, and whose machine frames are whose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.actors.vmm.memory import ABSENT, MemoryManagement
from penumbra.actors.vmm.residents import (
    RECENT,
    FramePool,
    HostMemoryShortError,
    Residents,
    least_host_frames,
)
from penumbra.hw.memory import Ram

pytestmark = pytest.mark.shows("V3")
N_GUEST, N_HOST = 24, 10


never = frozenset[int]().__contains__


def residents(n: int) -> Residents:
    made = Residents()
    for gfn in range(n):
        made.arrive(gfn)
    return made


def test_the_frame_that_came_first_goes_first() -> None:
    some = residents(4)
    gone = []
    while (gfn := some.victim(never, never)) is not None:
        gone.append(gfn)
        some.leave(gfn)
    assert gone == [0, 1, 2, 3]


def test_a_traced_table_is_passed_by_once_and_no_more() -> None:
    some = residents(3)
    assert some.victim(never, {0}.__contains__) == 1
    some.leave(1)
    assert some.victim(never, {0, 2}.__contains__) == 0


def test_what_has_to_stay_stays_even_if_nothing_else_is_left() -> None:
    assert residents(5).victim({0, 1, 2, 3, 4}.__contains__, never) is None
    assert residents(5).victim({0, 1, 3, 4}.__contains__, {2}.__contains__) == 2


def test_the_last_frames_an_instruction_wanted_are_recent_and_older_ones_are_not() -> None:
    some = residents(RECENT + 2)
    for gfn in [*range(RECENT + 1), 1]:
        some.wanted(gfn)
    assert [gfn for gfn in range(RECENT + 2) if not some.is_recent(gfn)] == [0, RECENT + 1]


class Village:
    """A VM that gives frames back as long as it has any."""

    def __init__(self, pool: FramePool, vm: int) -> None:
        self.pool, self.frames = pool, list[int]()
        pool.holders[vm] = self
        self._vm = vm

    @property
    def n_resident(self) -> int:
        return len(self.frames)

    def grow(self) -> None:
        self.frames.append(self.pool.take(self._vm))

    def evict(self) -> bool:
        if self.frames:
            self.pool.give(self.frames.pop())
            return True
        return False


def test_the_vm_that_holds_most_gives_when_the_pool_is_empty() -> None:
    owner = np.full(8, -1, np.int16)
    pool = FramePool([2, 3, 4, 5, 6], owner)
    large, small = Village(pool, 0), Village(pool, 1)
    for _ in range(4):
        large.grow()
    small.grow()
    assert owner.tolist() == [-1, -1, 1, 0, 0, 0, 0, -1]
    small.grow()
    assert (large.n_resident, small.n_resident) == (3, 2)
    assert [owner[pfn] for pfn in large.frames + small.frames] == [0, 0, 0, 1, 1]
    pool.check()


def test_a_pool_whose_frames_must_all_stay_says_so() -> None:
    with pytest.raises(HostMemoryShortError):
        FramePool([]).take(0)


def test_the_least_memory_holds_what_must_stay_for_every_vcpu() -> None:
    assert [least_host_frames(n) for n in (1, 16)] == [34, 64]


# ---- the frame map against a plain model ---------------------------------------------------------


def page_of(value: int) -> bytes:
    return value.to_bytes(8, "little") + bytes(4088)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["bring", "away", "move", "share", "store"]),
            st.integers(0, N_GUEST - 1),
            st.integers(0, 2),
        ),
        max_size=60,
    )
)
def test_content_follows_a_guest_frame_wherever_it_goes(steps: list[tuple[str, int, int]]) -> None:
    memory = MemoryManagement(Ram(N_HOST), N_GUEST, identity=False, seed=1, frames=(), absent=True)
    memory.ram.array[:] = 0xEE  # what others have left behind
    free, model = list(range(N_HOST)), [0] * N_GUEST

    def room() -> None:
        if not free:
            pfn = max(memory.guest_of)
            memory.send_away(pfn)
            free.append(pfn)

    for what, gfn, value in steps:
        if what == "bring" and memory.is_absent(gfn):
            room()
            memory.bring(gfn, free.pop())
        elif what == "away" and not memory.is_absent(gfn):
            pfn = memory.frame_view[gfn]
            memory.send_away(pfn)
            free.append(pfn)
        elif what == "move" and free and not memory.is_absent(gfn):
            old = memory.move(gfn, free.pop())
            free += [] if old is None else [old]
        elif what == "share" and not memory.is_absent(gfn):
            for pfn, other in list(memory.guest_of.items()):
                if pfn != memory.frame_view[gfn] and model[other] == model[gfn]:
                    old = memory.share(gfn, pfn)
                    free += [] if old is None else [old]
                    break
        elif what == "store" and memory.ready(gfn, True):
            memory.store(gfn << 12, 8, value)
            model[gfn] = value
        memory.check()
        assert [memory.page(gfn) for gfn in range(N_GUEST)] == [page_of(v) for v in model]
        assert [memory.load(gfn << 12, 8) for gfn in range(N_GUEST)] == model
        assert sorted([*free, *memory.guest_of]) == list(range(N_HOST))
        for gfn in range(N_GUEST):
            alone = len(memory.guests(memory.frame_view[gfn])) == 1
            assert memory.ready(gfn, True) == (memory.frame_view[gfn] != ABSENT and alone)
