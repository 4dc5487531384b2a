"""Which machine frame backs which guest frame."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.memory import UNBACKED, MemoryManagement, MonitorMemoryShortError
from penumbra.hw.memory import Ram


@pytest.mark.shows("V3")
def test_guest_frames_are_scattered_and_the_monitors_are_others() -> None:
    memory = MemoryManagement(Ram(32), 24, identity=False, seed=7)
    memory.check()
    frames = memory.frame_map.tolist()
    assert frames != list(range(24))
    taken = [memory.take_frame() for _ in range(8)]
    assert sorted(frames + taken) == list(range(32))
    with pytest.raises(MonitorMemoryShortError):
        memory.take_frame()
    memory.give_frame(taken[3])
    assert memory.take_frame() == taken[3]
    memory.check()


@pytest.mark.shows("V3")
def test_the_same_seed_scatters_the_same_way() -> None:
    maps = [
        MemoryManagement(Ram(32), 24, identity=False, seed=seed).frame_map.tolist()
        for seed in (3, 3, 4)
    ]
    assert maps[0] == maps[1] != maps[2]


def test_without_a_monitor_guest_and_machine_addresses_are_the_same() -> None:
    memory = MemoryManagement(Ram(16), 16, identity=True, seed=1)
    assert memory.frame_map.tolist() == list(range(16))
    assert (memory.hpa(0x5123), memory.hpa(0x1_0000)) == (0x5123, None)


def test_a_frame_comes_back_zeroed() -> None:
    memory = MemoryManagement(Ram(4), 2, identity=False, seed=1)
    pfn = memory.take_frame()
    memory.ram.store(pfn << 12, 8, 1 << 63)
    memory.give_frame(pfn)
    assert memory.take_frame() == pfn
    assert memory.ram.load(pfn << 12, 8) == 0


@pytest.mark.shows("H1")
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_beyond_the_guests_memory_reads_are_ones_and_stores_vanish(size: int) -> None:
    memory = MemoryManagement(Ram(8), 4, identity=False, seed=1)
    before = bytes(memory.ram.bytes)
    memory.store(0x4000, size, 0)
    assert bytes(memory.ram.bytes) == before
    assert memory.load(0x4000, size) == (1 << 8 * size) - 1
    memory.store(0x2010, size, 0x5A)
    assert memory.load(0x2010, size) == 0x5A
    assert memory.ram.load((memory.frame_view[2] << 12) + 0x10, size) == 0x5A


@pytest.mark.shows("V3")
@pytest.mark.parametrize("identity", [False, True])
def test_guest_memory_may_have_holes(identity: bool) -> None:
    ram = Ram(64 if identity else 8)
    memory = MemoryManagement(ram, 64, identity=identity, seed=1, backed=[2, 5, 63])
    memory.check()
    assert [gfn for gfn, pfn in enumerate(memory.frame_map.tolist()) if pfn != UNBACKED] == [
        2,
        5,
        63,
    ]
    assert list(memory.guest_of.values()) == [2, 5, 63]
    if identity:
        assert list(memory.guest_of) == [2, 5, 63]
    memory.store(0x5008, 4, 7)
    memory.store(0x6008, 4, 7)
    assert (memory.load(0x5008, 4), memory.load(0x6008, 4)) == (7, 0xFFFFFFFF)
    assert memory.hpa(0x6008) is None
