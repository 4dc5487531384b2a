"""Single operations: what they move, where they stop, and that a stop leaves nothing behind."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import operations as o
from penumbra.hw.exits import (
    Done,
    GeneralProtection,
    PageFault,
    Privileged,
    Spinning,
    SystemCall,
)
from penumbra.hw.formats import IA32, X86_64, FormatSpec

from .rig import ALL, PAGE, READ, WRITE, A, D, P, Rig, U

ONES = (1 << 64) - 1
BASE = 0x0040_0000
FIRST, SECOND = 40, 50  # two neighbouring pages lie in frames far apart


@pytest.fixture(params=[IA32, X86_64], ids=lambda spec: spec.name)
def rig(request: pytest.FixtureRequest) -> Rig:
    """A machine with two pages at BASE, and nothing behind them."""
    return two_pages(request.param)


def two_pages(spec: FormatSpec) -> Rig:
    rig = Rig(spec)
    rig.map(BASE, FIRST)
    rig.map(BASE + PAGE, SECOND)
    return rig


def view(rig: Rig) -> bytearray:
    """Return the two pages as a program sees them."""
    frames = rig.ram.array.reshape(-1, PAGE)
    return bytearray(frames[FIRST].tobytes() + frames[SECOND].tobytes())


Single: TypeAlias = o.Load | o.Store | o.Exchange | o.CompareExchange | o.XorMemory
sizes = st.sampled_from([1, 2, 4, 8])
values = st.integers(0, ONES)
gvas = st.one_of(st.integers(0, 2 * PAGE - 8), st.integers(PAGE - 8, PAGE)).map(BASE.__add__)
singles = st.one_of(
    st.builds(o.Load, gvas, sizes),
    st.builds(o.Store, gvas, sizes, values),
    st.builds(o.Exchange, gvas, sizes, values),
    st.builds(o.XorMemory, gvas, sizes, values),
    st.builds(o.CompareExchange, gvas, sizes, st.sampled_from([0, 7]), values),
)


@pytest.mark.shows("H1")
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_operations_of_any_size_at_any_address_act_as_on_a_row_of_bytes(spec: FormatSpec) -> None:
    @settings(deadline=None, max_examples=200)
    @given(steps=st.lists(st.tuples(singles, st.booleans()), max_size=12), flagged=st.booleans())
    def run(steps: list[tuple[Single, bool]], flagged: bool) -> None:
        rig = two_pages(spec)
        rig.ram.flags[SECOND] = flagged
        row, n_told = bytearray(2 * PAGE), 0
        for work, user in steps:
            start, end = work.gva - BASE, work.gva - BASE + work.size
            old = int.from_bytes(row[start:end], "little")
            answer = rig.cpu.run(work, user)
            assert answer == Done(0 if isinstance(work, o.Store) else old)
            if isinstance(work, o.Load):
                continue
            if not isinstance(work, o.CompareExchange) or old == work.expected:
                new = work.value ^ (old if isinstance(work, o.XorMemory) else 0)
                row[start:end] = (new & (1 << 8 * work.size) - 1).to_bytes(work.size, "little")
                n_told += flagged and end > PAGE
            assert view(rig) == row
        assert len(rig.flagged) == n_told

    run()


@pytest.mark.shows("H1")
def test_a_flagged_frame_tells_each_store_with_what_was_there(rig: Rig) -> None:
    rig.ram.flags[SECOND] = 1
    rig.cpu.run(o.Store(BASE + PAGE - 2, 4, 0x44332211), user=True)
    rig.cpu.run(o.Exchange(BASE + PAGE, 2, 0xBEEF), user=True)
    rig.cpu.run(o.CompareExchange(BASE + PAGE, 2, 0, 1), user=True)
    second = SECOND * PAGE
    assert rig.flagged == [(second, 2, 0, 0x4433), (second, 2, 0x4433, 0xBEEF)]
    assert rig.ram.load(second, 2) == 0xBEEF


@pytest.mark.shows("H2")
@pytest.mark.parametrize(
    "work",
    [
        o.Store(BASE + PAGE - 3, 8, ONES),
        o.Exchange(BASE + PAGE - 3, 8, ONES),
        o.XorMemory(BASE + PAGE - 3, 8, ONES),
        o.CompareExchange(BASE + PAGE - 3, 8, 0, ONES),
    ],
)
@pytest.mark.parametrize("denied", [0, P | U])
def test_an_access_whose_second_page_faults_leaves_the_first_untouched(
    rig: Rig, work: o.Operation, denied: int
) -> None:
    rig.map(BASE + PAGE, SECOND, denied)
    before = view(rig)
    assert rig.cpu.run(work, user=True) == PageFault(
        BASE + PAGE, 6 | bool(denied), at=0, kind=WRITE
    )
    assert view(rig) == before
    rig.map(BASE + PAGE, SECOND)
    assert isinstance(rig.cpu.run(work, user=True), Done)
    assert view(rig)[PAGE - 3 : PAGE + 5] == b"\xff" * 8


@pytest.mark.shows("H2")
def test_a_locked_access_needs_write_rights_even_when_it_stores_nothing(rig: Rig) -> None:
    entry = rig.map(BASE, FIRST, P | U)
    compare = o.CompareExchange(BASE + 8, 4, expected=1, value=2)
    assert rig.cpu.run(compare, user=True) == PageFault(BASE + 8, 7, kind=WRITE)
    rig.map(BASE, FIRST)
    assert rig.cpu.run(compare, user=True) == Done(0)
    assert rig.word(entry) & (A | D) == A | D


@pytest.mark.shows("H1")
def test_beyond_ram_reads_are_all_ones_and_stores_vanish(rig: Rig) -> None:
    rig.map(BASE, rig.ram.n_frames)
    rig.map(BASE + PAGE, rig.ram.n_frames - 1)
    before = bytes(rig.ram.bytes)
    for size in (1, 2, 4, 8):
        ones = (1 << 8 * size) - 1
        assert rig.cpu.run(o.Load(BASE, size), user=True) == Done(ones)
        assert rig.cpu.run(o.Exchange(BASE, size, 5), user=True) == Done(ones)
    assert rig.cpu.run(o.Fill(BASE, 64, 5), user=True) == Done()
    # Half inside: the last frame of RAM stands behind the page that is beyond it.
    assert rig.cpu.run(o.Load(BASE + PAGE - 4, 8), user=True) == Done(0xFFFFFFFF)
    assert rig.cpu.run(o.Copy(BASE + PAGE, BASE, 16), user=True) == Done()
    assert rig.ram.load((rig.ram.n_frames - 1) * PAGE, 8) == ONES
    rig.ram.clear_frame(rig.ram.n_frames - 1)
    tables = 8 * PAGE
    assert bytes(rig.ram.bytes)[tables:] == before[tables:]


@pytest.mark.shows("H1", "H9")
@pytest.mark.parametrize(
    "work",
    [
        o.Invlpg(0), o.LoadControl(3, 0), o.ReadControl(2), o.SendIpi(1, 32), o.Halt(),
        o.SetInterrupts(True), o.ArmTimer(5), o.TrapReturn(True, True), o.SwitchThread(1),
        o.LoadPhysical(0, 4), o.StorePhysical(0, 4, 1), o.ExchangePhysical(0, 4, 1),
    ],
    ids=lambda work: type(work).__name__,
)  # fmt: skip
def test_privileged_operations_exit_in_supervisor_mode_and_are_refused_to_users(
    rig: Rig, work: o.Operation
) -> None:
    assert rig.cpu.run(work, user=False) == Privileged()
    assert rig.cpu.run(work, user=True) == GeneralProtection(f"{type(work).__name__} in user mode")


@pytest.mark.shows("H1")
def test_a_physical_access_may_not_cross_a_page(rig: Rig) -> None:
    refusal = GeneralProtection("a physical access crosses a page")
    assert rig.cpu.run(o.LoadPhysical(PAGE - 4, 4), user=False) == Privileged()
    assert rig.cpu.run(o.LoadPhysical(PAGE - 4, 8), user=False) == refusal


@pytest.mark.shows("H1")
def test_physical_operations_are_completed_where_their_address_lies(rig: Rig) -> None:
    seen: list[tuple[int, int, int, int]] = []
    rig.cpu.on_flagged = lambda *store: seen.append(store)
    rig.ram.flags[40] = 1
    at = 40 * PAGE + 8
    for work, result in (
        (o.StorePhysical(0x5008, 4, 7), 0),
        (o.ExchangePhysical(0x5008, 4, 9), 7),
        (o.LoadPhysical(0x5008, 4), 9),
    ):
        kind = READ if isinstance(work, o.LoadPhysical) else WRITE
        assert rig.cpu.next_accesses(work, 0) == [(0x5008, 4, kind)]
        assert rig.cpu.complete(work, 0, [at]) == (Done(result), 0)
    assert seen == [(at, 4, 0, 7), (at, 4, 7, 9)]


@pytest.mark.shows("H1")
def test_system_calls_exit_and_marks_do_nothing(rig: Rig) -> None:
    assert rig.cpu.run(o.Syscall("read", (1, 2)), user=True) == SystemCall()
    assert rig.cpu.run(o.Mark("here"), user=True) == Done()


@pytest.mark.shows("H3")
@pytest.mark.parametrize("gva", [1 << 47, 0xFFFF_7FFF_FFFF_FFFF, (1 << 47) - 4, 1 << 64, -8])
def test_a_non_canonical_byte_is_a_general_protection_fault(gva: int) -> None:
    rig = Rig(X86_64)
    rig.map((1 << 47) - PAGE, FIRST)
    for work in (
        o.Load(gva, 8), o.Store(gva, 8, 1), o.Exchange(gva, 8, 1), o.CompareExchange(gva, 8, 0, 1),
        o.SpinUntil(gva, 8, 1, 1),
    ):  # fmt: skip
        assert isinstance(rig.cpu.run(work, user=True), GeneralProtection)
    assert rig.ram.load(FIRST * PAGE + PAGE - 4, 4) == 0


@pytest.mark.shows("H3")
def test_a_string_operation_goes_on_up_to_the_first_non_canonical_byte() -> None:
    rig = Rig(X86_64)
    rig.map((1 << 47) - PAGE, FIRST)
    last = (1 << 47) - 16
    assert isinstance(rig.cpu.run(o.Fill(last, 32, 7), user=True), GeneralProtection)
    assert rig.ram.load(FIRST * PAGE + PAGE - 16, 8) == 7


@pytest.mark.shows("H2")
def test_a_32_bit_access_at_the_top_wraps_to_address_zero() -> None:
    rig = Rig(IA32)
    rig.map(0xFFFF_F000, FIRST)
    store = o.Store(0xFFFF_FFFE, 4, 0x44332211)
    assert rig.cpu.run(store, user=True) == PageFault(0, 6, kind=WRITE)
    rig.map(0, SECOND)
    assert rig.cpu.run(store, user=True) == Done()
    assert (rig.ram.load(FIRST * PAGE + 4094, 2), rig.ram.load(SECOND * PAGE, 2)) == (
        0x2211, 0x4433,
    )  # fmt: skip
    assert rig.cpu.next_accesses(store, 0) == [(0xFFFF_FFFE, 2, WRITE), (0, 2, WRITE)]
    assert isinstance(rig.cpu.run(o.Load(1 << 32, 4), user=True), GeneralProtection)


@pytest.mark.shows("H1")
@pytest.mark.parametrize(
    "work",
    [
        o.Load(BASE, 0), o.Store(BASE, 5000, 0), o.SpinUntil(BASE, 0, 0, 0), o.Fill(BASE + 4, 8, 0),
        o.Fill(BASE, 12, 0), o.Copy(BASE + 1, BASE, 8), o.Copy(BASE, BASE + 1, 8),
        o.Copy(BASE, BASE, 4), o.Block(0, 0, 1), o.Block(-1, 0, 0),
    ],
    ids=repr,
)  # fmt: skip
def test_an_operation_no_processor_has_ends_in_the_guest_and_not_in_the_host(
    rig: Rig, work: o.Operation
) -> None:
    before = view(rig)
    assert isinstance(rig.cpu.run(work, user=True), GeneralProtection)
    assert view(rig) == before


@pytest.mark.shows("H1")
@pytest.mark.parametrize("value", [-1, 1 << 80, (1 << 64) + 3])
def test_a_value_wider_than_its_store_is_cut(rig: Rig, value: int) -> None:
    for work in (
        o.Store(BASE, 8, value),
        o.Exchange(BASE + 8, 8, value),
        o.Fill(BASE + 16, 8, value),
    ):
        assert isinstance(rig.cpu.run(work, user=True), Done)
    assert [rig.ram.load(FIRST * PAGE + at, 8) for at in (0, 8, 16)] == [value & ONES] * 3


@pytest.mark.shows("H5")
def test_registers_take_any_value_a_guest_may_write(rig: Rig) -> None:
    rig.cpu.load_root(ONES)
    assert isinstance(rig.access(BASE, READ), tuple)
    rig.cpu.invlpg(ONES)
    rig.cpu.invlpg(1 << 70)
    rig.cpu.load_root(rig.root * PAGE | 0xFFF)
    assert rig.reads(BASE) == FIRST


@pytest.mark.shows("H1")
def test_a_spin_reads_once_and_says_where_it_waits(rig: Rig) -> None:
    rig.map(BASE, FIRST, P | U)
    spin = o.SpinUntil(BASE + 12, 4, mask=0xF0, value=0x10)
    assert rig.cpu.run(spin, user=True) == Spinning(FIRST * PAGE + 12)
    rig.ram.store(FIRST * PAGE + 12, 4, 0x12345613)
    assert rig.cpu.run(spin, user=True) == Done(0x12345613)
    assert rig.cpu.run(o.SpinUntil(0x9000, 4, 1, 1), user=True) == PageFault(0x9000, 4)


@pytest.mark.shows("H2")
def test_each_page_of_an_access_is_reported_with_the_frame_it_used(rig: Rig) -> None:
    used: list[tuple[int, int, bool, int]] = []
    rig.cpu.on_used = lambda *access: used.append(access)
    rig.cpu.run(o.Load(BASE + 4, 4), user=False)
    rig.cpu.run(o.Store(BASE + PAGE - 1, 2, 0), user=True)
    rig.cpu.run(o.Load(0x9000, 4), user=True)
    assert used == [
        (BASE + 4, READ, False, FIRST),
        (BASE + PAGE - 1, WRITE, True, FIRST),
        (BASE + PAGE, WRITE, True, SECOND),
    ]
    rig.map(BASE, FIRST, ALL)


@pytest.mark.shows("H1")
def test_memory_of_no_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        Rig(IA32, n_frames=0)
