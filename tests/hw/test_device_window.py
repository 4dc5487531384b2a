"""The window's registers, and how both engines of a CPU reach them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.hw import device_window as w
from penumbra.hw import operations as o
from penumbra.hw.exits import Done, GeneralProtection, MachineCheck, PageFault
from penumbra.hw.formats import FORMATS, IA32, MAXPHYADDR, PAE, SV39, X86_64
from penumbra.hw.interrupts import DEVICE_VECTORS, NEVER, InterruptController
from penumbra.hw.streams import AccessStream

from .rig import ALL, ENGINES, PAGE, WRITE, Rig

pytestmark = pytest.mark.shows("V11")

GVA = 0x0040_0000


class Line:
    """What comes out of a window."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int, int]] = []
        self.lines: list[tuple[int, str]] = []

    def interrupt(self, cpu: int, targets: int, vector: int, progress: int) -> None:
        self.sent.append((cpu, targets, vector, progress))

    def line(self, cpu: int, text: str) -> None:
        self.lines.append((cpu, text))


def window(n: int = 2) -> tuple[w.DeviceWindow, Line, list[InterruptController]]:
    controllers, outside = [InterruptController() for _ in range(n)], Line()
    return w.DeviceWindow(controllers, outside), outside, controllers


def test_the_window_lies_above_any_ram_and_within_what_entries_address() -> None:
    assert [w.window_base(spec) for spec in (IA32, PAE, X86_64, SV39)] == [
        0xFEE0_0000, 0xFF_FEE0_0000, 0xFF_FEE0_0000, 0xFF_FEE0_0000,
    ]  # fmt: skip
    for spec in FORMATS.values():
        (frame,) = w.window_frames(spec)
        assert 16 << 30 < w.window_base(spec) < 1 << MAXPHYADDR or spec is IA32
        assert frame * PAGE == w.window_base(spec)


@given(st.integers(0, PAGE - 1), st.integers(-1, PAGE))
def test_an_access_within_one_register_and_no_other_is_one(offset: int, size: int) -> None:
    inside = 1 <= size <= 8 and offset // 8 == (offset + size - 1) // 8
    assert (w.refused(offset, size) is None) == inside


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8), st.integers(0, (1 << 64) - 1))))
def test_the_scratch_register_is_eight_bytes_of_memory(
    stores: list[tuple[int, int, int]],
) -> None:
    device, _, _ = window()
    memory = bytearray(8)
    for i, (first, n, value) in enumerate(stores):
        size = min(n, 8 - first)
        memory[first : first + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        device.store(i % 2, w.SCRATCH + first, size, value, 5)
        assert device.load(0, w.SCRATCH, 8, 7) == int.from_bytes(memory, "little")
        for at in range(8):
            assert device.load(1, w.SCRATCH + at, 1, 7) == memory[at]


def test_what_is_no_register_reads_as_nothing_and_takes_nothing() -> None:
    device, outside, controllers = window()
    before = [device.load(0, at, 8, 9) for at in range(0, PAGE, 8)]
    known = {w.ID, w.VERSION_AT, w.CONSOLE, w.COUNTER, w.SCRATCH, w.COMMAND, w.TIMER, w.END}
    for at in range(0, PAGE, 8):
        if at not in known:
            device.store(0, at, 8, (1 << 64) - 1, 9)
    for at in (w.ID, w.VERSION_AT, w.COUNTER):
        device.store(0, at, 8, 0, 9)
    assert [device.load(0, at, 8, 9) for at in range(0, PAGE, 8)] == before
    assert {at for at, value in zip(range(0, PAGE, 8), before, strict=True) if value} == {
        w.ID, w.VERSION_AT, w.COUNTER,
    }  # fmt: skip
    assert (outside.sent, outside.lines) == ([], [])
    assert all(one.next_due == NEVER for one in controllers)


def test_a_command_is_sent_by_its_lowest_byte_to_those_it_names() -> None:
    device, outside, _ = window(3)
    for word in (
        0x51 | 0b101 << 32,
        0x5F | 1 << 18,
        0x50 | 2 << 18,
        0x55 | 3 << 18,
        0x51 | 8 << 32,
    ):
        device.store(1, w.COMMAND + 4, 4, word >> 32, 10)
        n = len(outside.sent)
        device.store(1, w.COMMAND, 4, word & 0xFFFF_FFFF, 11)
        assert len(outside.sent) == n + 1
    assert outside.sent == [
        (1, 0b101, 0x51, 11), (1, 0b010, 0x5F, 11), (1, 0b111, 0x50, 11), (1, 0b101, 0x55, 11),
        (1, 0, 0x51, 11),
    ]  # fmt: skip
    assert device.load(1, w.ERROR, 8, 12) == 0
    for vector in set(range(256)) - set(DEVICE_VECTORS):
        device.store(2, w.COMMAND, 8, vector | 2 << 18, 12)
    assert len(outside.sent) == 5
    assert [device.load(cpu, w.ERROR, 8, 13) for cpu in range(3)] == [0, 0, w.ILLEGAL_VECTOR]


def test_an_interrupt_in_service_holds_the_next_one_back_and_no_other_kind() -> None:
    device, _, (one, _) = window()
    for due, vector in ((5, 0x52), (4, 0x51), (6, 0x41)):
        one.post(due, vector)
    device.store(0, w.TIMER, 8, 3, 4)
    assert (device.load(0, w.REMAINING, 8, 5), one.next_due) == (2, 4)
    assert [one.take(9), one.next_due] == [0x41, 4]
    assert [one.take(9), one.take(9), one.next_due] == [0x51, None, NEVER]
    assert device.load(0, w.IN_SERVICE, 4, 9) == 0x51
    one.post(8, 0x42)
    assert [one.take(9), one.take(9)] == [0x42, None]
    device.store(0, w.END, 4, 0, 9)
    assert [one.take(9), one.take(9)] == [0x52, None]
    device.store(0, w.END, 4, 0, 9)
    assert [one.take(6), one.take(7), device.load(0, w.REMAINING, 8, 7)] == [None, 0x50, 0]
    device.store(0, w.END, 4, 0, 9)
    device.store(0, w.END, 4, 0, 9)  # one too many does nothing
    assert (device.load(0, w.IN_SERVICE, 8, 9), one.next_due) == (0, NEVER)
    device.check()


def test_text_is_handed_on_by_lines_and_kept_up_to_a_limit() -> None:
    device, outside, _ = window()
    for i, byte in enumerate(b"one\n\ntwo\xff\nthree"):
        device.store(i % 2, w.CONSOLE, 8, byte, i)
    device.store(0, w.CONSOLE + 1, 1, ord("x"), 99)  # not the lowest byte
    assert outside.lines == [(1, "one"), (0, ""), (1, "two\\xff")]
    device.flush()
    device.flush()
    assert outside.lines[3:] == [(0, "three")]
    for _ in range(w.MAX_TEXT):
        device.store(0, w.CONSOLE, 1, ord("."), 100)
    assert device.load(0, w.CONSOLE, 8, 0) == w.MAX_TEXT + 15 > len(device.text) == w.MAX_TEXT
    device.check()


def attached(engine: str, streams: tuple[AccessStream, ...] = ()) -> tuple[Rig, w.DeviceWindow]:
    """Return a CPU with a window mapped at GVA, memory before and a hole behind it."""
    rig = Rig(X86_64, engine, streams=streams)
    device, _, _ = window(1)
    base = w.window_base(X86_64)
    rig.cpu.attach_device(w.DevicePort(device, 0, base, lambda: 100))
    for i, pfn in enumerate((40, base >> 12, 50_000)):
        rig.map(GVA + i * PAGE, pfn, ALL)
    return rig, device


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_makes_each_run_on_the_window_an_access_at_its_own_progress(engine: str) -> None:
    pages = np.array([GVA >> 12, (GVA >> 12) + 1], np.int64)
    runs = [
        7 << 14 | WRITE, 1 << 40 | 2 << 14 | w.TIMER << 2 | WRITE,
        1 << 40 | 3 << 14, 1 << 14 | WRITE,
    ]  # fmt: skip
    rig, device = attached(engine, (AccessStream(pages, np.array(runs, np.int64), 1),))
    for lap in range(2):  # misses, then hits
        assert rig.cpu.run(o.Block(0, 0, 4), True) == Done(), lap
    # The store came after 7 of progress: at 107 it set the timer to its value.
    assert device.load(0, w.REMAINING, 8, 100 + 13 + 7) == (1 << 40) + 1
    assert rig.cpu.device is not None
    assert rig.cpu.device.n_accesses == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hole_is_no_device(engine: str) -> None:
    rig, _ = attached(engine)
    hole, device = GVA + 2 * PAGE, GVA + PAGE
    assert rig.cpu.run(o.Load(hole + w.SCRATCH, 8), True) == Done((1 << 64) - 1)
    assert rig.cpu.run(o.Load(device + w.SCRATCH, 8), True) == Done(0)
    rig.cpu.machine_checks = True
    assert isinstance(rig.cpu.run(o.Load(hole, 8), True), MachineCheck)
    assert rig.cpu.run(o.Load(device + w.COUNTER, 8), True) == Done(100)
    rig.cpu.attach_device(None)
    assert isinstance(rig.cpu.run(o.Load(device, 8), True), MachineCheck)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_refused_changes_nothing_and_faults_come_first(engine: str) -> None:
    rig, device = attached(engine)
    device.store(0, w.SCRATCH, 8, 5, 0)
    at = GVA + PAGE
    for work in (
        o.Store(at + w.SCRATCH + 4, 8, 9), o.Store(at + w.SCRATCH, 16, 9), o.Load(at - 1, 2),
        o.Exchange(at + PAGE - 4, 8, 9), o.SpinUntil(at + w.SCRATCH, 8, 1, 0),
    ):  # fmt: skip
        assert isinstance(rig.cpu.run(work, True), GeneralProtection), work
    assert device.load(0, w.SCRATCH, 8, 0) == 5
    rig.map(at + PAGE, 50_000, 0)
    rig.cpu.invlpg(at + PAGE)
    fault = rig.cpu.run(o.Store(at + PAGE - 4, 8, 9), True)
    assert isinstance(fault, PageFault)
    assert fault.gva == at + PAGE
