"""The second-level table: where each guest frame lies, and what lies behind a hole."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.derive import NOWHERE
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.nested import SecondLevel, frames_for
from penumbra.hw.formats import PAGE_SHIFT
from penumbra.hw.memory import Ram

N = 1500


def made(backed: range | None = None) -> tuple[MemoryManagement, SecondLevel]:
    n_backed = N if backed is None else len(backed)
    ram = Ram(n_backed + frames_for(N))
    memory = MemoryManagement(ram, N, identity=False, seed=1, backed=backed)
    return memory, SecondLevel(memory)


@pytest.mark.shows("V3", "S2")
def test_every_backed_frame_is_mapped_from_the_start_and_no_other() -> None:
    memory, second = made(range(100, 1400))
    second.check()
    assert second.entry(100) >> PAGE_SHIFT == memory.frame_view[100]
    assert second.entry(99) == second.entry(1 << 27) == 0


@pytest.mark.shows("V11", "H1")
def test_a_hole_leads_to_no_memory() -> None:
    memory, second = made(range(100, 1400))
    for gfn in (99, N - 1, N + 5, 1 << 27):
        assert second.machine_address(gfn << 12 | 8) == NOWHERE << 12 | 8
        assert memory.ram.load(NOWHERE << 12 | 8, 8) == (1 << 64) - 1
    second.check()


@pytest.mark.shows("V11")
def test_a_guest_that_touches_holes_everywhere_gets_no_more_than_its_share_of_tables() -> None:
    memory, second = made()
    for number in range(500):
        second.back((1 << 20 | number << 18) << 12)
        assert second.entry(1 << 20 | number << 18) >> PAGE_SHIFT == NOWHERE
    second.check()
    memory.check()
    assert second.entry(1 << 20) == 0, "old holes were given up"


@pytest.mark.shows("V3")
def test_a_frame_that_was_moved_is_mapped_where_it_lies_now() -> None:
    memory, second = made()
    new, old = memory.take_frame(), memory.frame_view[7]
    second.forget(7)
    assert second.entry(7) == 0
    assert memory.move(7, new) == old
    second.back(7 << 12)
    second.check()
    assert second.machine_address(7 << 12) >> PAGE_SHIFT == new


@pytest.mark.shows("V3")
def test_a_frame_that_others_share_is_mapped_read_only_until_it_is_its_own() -> None:
    memory, second = made()
    into = memory.frame_view[8]
    for gfn in (7, 8):
        second.forget(gfn)
    old = memory.share(7, into)
    assert old is not None
    second.back(7 << 12)
    assert second.entry(7) == into << PAGE_SHIFT | 0b101, "read and fetch"
    second.forget(7)
    memory.move(7, old)
    second.back(7 << 12)
    second.back(8 << 12)
    second.check()
    assert (second.entry(7), second.entry(8)) == (old << PAGE_SHIFT | 7, into << PAGE_SHIFT | 7)
