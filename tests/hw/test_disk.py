"""The disk and its queue: what is refused, in which order transfers are due, who is told."""

from __future__ import annotations

import pytest

from penumbra.hw.disk import QUEUE_LIMIT, Disk
from penumbra.hw.formats import PAGE_BYTES
from penumbra.hw.interrupts import NEVER


@pytest.mark.shows("H8")
def test_transfers_are_due_in_order_and_each_ticket_is_handed_back_once_to_its_owner() -> None:
    disk = Disk(4, 100)
    late = disk.start(0, 1, 0x3000, True, 50)
    early = disk.start(1, 2, 0x4000, False, 10)
    assert late is not None
    assert early is not None
    assert (disk.next_due, disk.take_due(109)) == (110, None)
    assert [disk.take_due(200), disk.take_due(200), disk.take_due(200)] == [early, late, None]
    assert disk.next_due == NEVER
    assert [disk.take_finished(cpu) for cpu in (0, 0, 1, 1)] == [1, 0, 2, 0]
    disk.check()


@pytest.mark.parametrize(
    ("block", "gpa"), [(4, 0), (-1, 0), (0, 1), (0, -PAGE_BYTES), (1 << 70, 0)]
)
def test_a_transfer_that_cannot_be_is_refused_and_leaves_nothing_behind(
    block: int, gpa: int
) -> None:
    disk = Disk(4, 1)
    assert disk.start(0, block, gpa, True, 0) is None
    assert (disk.next_due, disk.n_started) == (NEVER, 0)


@pytest.mark.shows("H8")
def test_a_full_queue_refuses_until_something_is_taken_out() -> None:
    disk = Disk(1, 1)
    accepted = [disk.start(0, 0, 0, True, 0) for _ in range(QUEUE_LIMIT + 1)]
    assert accepted.count(None) == 1
    disk.take_due(1)
    assert disk.start(0, 0, 0, True, 0) is not None
    disk.check()


@pytest.mark.shows("H8")
def test_blocks_are_zero_until_written() -> None:
    disk = Disk(2, 1)
    disk.write(1, b"\x07" * PAGE_BYTES)
    assert (disk.read(0), disk.read(1)) == (bytes(PAGE_BYTES), b"\x07" * PAGE_BYTES)
