"""The oracle's answers against the enumeration of all cache states, on short random histories."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .reference import Cpu, Reference
from .rig import NXE, PAE, PAGING, PGE, PSE, WP, A, D, Rig

Step = tuple[str, int, int, int]


@dataclass(frozen=True)
class World:
    """A small address space: the entries that exist, the values they may take, what is accessed."""

    name: str
    shifts: list[int]
    cr4: int
    efer: int
    roots: list[int]
    pages: list[int]
    frames: list[int]
    first: dict[int, int]
    choices: dict[int, list[int]]


# Roots 1 and 2, tables 4 and 5 (table 5 and root 1 also serve as each other's data), data 8-11.
_LEAF = [0, 0x8067, 0x9067, 0x9065, 0x9063, 0x9007, 0x9027, 0x8167, 0x9167]
_IA32 = World(
    name="ia32",
    shifts=[12, 22],
    cr4=PSE | PGE,
    efer=0,
    roots=[0x1000, 0x2000],
    pages=[0x0000, 0x1000, 0x400000],
    frames=[1, 4, 5, 8, 9, 10],
    first={0x1000: 0x4027, 0x1004: 0x4027, 0x2000: 0x5027, 0x4000: 0x8067, 0x4004: 0x9067},
    choices={
        0x1000: [0, 0x4027, 0x4025, 0x5027, 0x5007, 0xE7, 0x1E7, 0x1027, 0x2000E7],
        0x1004: [0, 0x4027, 0x4023],
        0x2000: [0, 0x4027, 0x5027],
        0x4000: _LEAF,
        0x4004: _LEAF,
        0x5000: _LEAF,
        0x5004: [0, 0xA067, 0xA167],
    },
)
_LONG_LEAF = [0, 0x8067, 0x9067, 0x9065, 0x8000_0000_0000_9067, 0x9027, 0x8167]
_X86_64 = World(
    name="x86-64",
    shifts=[12, 21, 30, 39],
    cr4=PAE | PGE,
    efer=NXE,
    roots=[0x1000, 0xB000],
    pages=[0x0000, 0x1000, 0x20_0000, 0x4000_0000],
    frames=[4, 8, 9, 512],
    first={
        0x1000: 0x2027, 0x2000: 0x3027, 0x2008: 0x3027, 0x3000: 0x4027, 0x3008: 0x4027,
        0x4000: 0x8067, 0xB000: 0x2027,
    },
    choices={
        0x1000: [0, 0x2027, 0x6027],
        0x2000: [0, 0x3027, 0x7027, 0x3023],
        0x2008: [0, 0x3027, 0x7027],
        0x3000: [0, 0x4027, 0x5027, 0xE7, 0x1E7, 0x8000_0000_0000_4027],
        0x3008: [0, 0x4027, 0x5027],
        0x6000: [0, 0x3027, 0x7027],
        0x7000: [0, 0x5027, 0x4027],
        0x4000: _LONG_LEAF,
        0x4008: _LONG_LEAF,
        0x5000: _LONG_LEAF,
        0xB000: [0, 0x2027, 0x6027],
    },
)  # fmt: skip

# Root 1 and root 0x1020 lie in one frame. Directories 2 and 3, tables 4 and 5.
_PAE_WORLD = World(
    name="pae",
    shifts=[12, 21, 30],
    cr4=PAE | PGE,
    efer=NXE,
    roots=[0x1000, 0x1020],
    pages=[0x0000, 0x1000, 0x20_0000, 0x4000_0000],
    frames=[4, 8, 9, 512],
    first={
        0x1000: 0x2001, 0x1020: 0x3001, 0x1028: 0x2001, 0x2000: 0x4027, 0x3000: 0x5027,
        0x4000: 0x8067, 0x5000: 0x9067,
    },
    choices={
        0x1000: [0, 0x2001, 0x3001, 0x2003, 0x1 << 52 | 0x3001],
        0x1008: [0, 0x2001, 0x3001],
        0x1020: [0, 0x2001],
        0x2000: [0, 0x4027, 0x5027, 0xE7, 0x1E7, 0x8000_0000_0000_4027, 0x10_0000_0000_5027],
        0x2008: [0, 0x4027, 0x5027],
        0x3000: [0, 0x4027, 0x4023],
        0x4000: _LONG_LEAF,
        0x4008: [0, 0x8067, 0x10_0000_0000_9067],
        0x5000: _LONG_LEAF,
    },
)  # fmt: skip

_LARGE = World(
    name="ia32",
    shifts=[12, 22],
    cr4=PSE | PGE,
    efer=0,
    roots=[0x1000],
    pages=[0x0000, 0x1000],
    frames=[0, 1, 8],
    first={0x1000: 0x1E7, 0x4000: 0x8067},
    choices={0x1000: [0xE7, 0x1E7, 0x1A7, 0x4027], 0x4000: [0x8067]},
)
_LINKS = World(
    name="ia32",
    shifts=[12, 22],
    cr4=PSE | PGE,
    efer=0,
    roots=[0x1000, 0x2000],
    pages=[0x0000, 0x1000],
    frames=[8, 9, 10],
    first={0x1000: 0x4027, 0x4000: 0x8067, 0x2000: 0},
    choices={
        0x1000: [0, 0x4027, 0x5027],
        0x4000: [0, 0x8067, 0x9067],
        0x4004: [0x8067, 0xA067],
        0x5000: [0x9067, 0xA067],
    },
)
_DEEP = World(
    name="x86-64",
    shifts=[12, 21, 30, 39],
    cr4=PAE | PGE,
    efer=NXE,
    roots=[0x1000],
    pages=[0x0000, 0x4000_0000],
    frames=[8, 9],
    first={0x1000: 0x2027, 0x2000: 0x3027, 0x3000: 0x4027, 0x4000: 0x8067},
    choices={
        0x1000: [0, 0x2027],
        0x2000: [0, 0x3027],
        0x3000: [0, 0x4027, 0x5027],
        0x4000: [0, 0x8067, 0x9067],
        0x5000: [0x9067],
    },
)
_WORLDS = pytest.mark.parametrize(
    "world",
    [_IA32, _LARGE, _LINKS, _X86_64, _DEEP, _PAE_WORLD],
    ids=["two levels", "large pages", "links", "four levels", "deep links", "registers"],
)


def steps_in(world: World, *, hardware: bool) -> st.SearchStrategy[list[Step]]:
    vcpu = st.integers(0, 1)
    page = st.sampled_from(world.pages)
    store = st.sampled_from(
        [("store", 0, gpa, value) for gpa, values in world.choices.items() for value in values]
    )
    names = ["invlpg", "fault"]
    error = st.sampled_from([4, 5, 6, 7, 0, 1, 3, 13, 21])
    event = st.tuples(st.sampled_from(names), vcpu, page, error)
    root = st.tuples(st.just("root"), vcpu, st.sampled_from(world.roots), st.just(0))
    mode = st.tuples(st.just("mode"), vcpu, st.sampled_from([PSE, PGE, WP]), st.just(0))
    kinds = [store, store, event, root, mode]
    if hardware:
        entry = st.sampled_from([("hardware", 0, gpa, 0) for gpa in world.choices])
        kinds.append(entry)
    return st.lists(st.one_of(kinds), min_size=1, max_size=14)


class Pair:
    """The oracle and the reference, fed the same steps."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rig = Rig(world.name, n_vcpus=2)
        for gpa, value in world.first.items():
            self.rig.hardware(gpa, value)
        self.rig.start(world.roots[0], cr4=world.cr4, efer=world.efer)
        self.reference = Reference(world.shifts, self.rig.width, self.rig.peek, world.pages)
        self.reference.cpus = [
            Cpu(world.roots[0], pse=True, pge=True, nxe=bool(world.efer)) for _ in range(2)
        ]
        for cpu in self.reference.cpus:
            assert self.load_registers(cpu)
        self.cr0 = [PAGING | WP] * 2
        self.cr4 = [world.cr4] * 2
        self.reference.settle()

    def load_registers(self, cpu: Cpu) -> bool:
        """Load what PAE holds in registers; tell whether hardware accepts it."""
        if self.world.name != "pae":
            return True
        entries = [self.rig.peek((cpu.cr3 & ~31) + 8 * i) for i in range(4)]
        if any(entry & 1 and entry & 0xFFF0_0000_0000_01E6 for entry in entries):
            return False
        cpu.top = entries
        return True

    def do(self, step: Step) -> None:
        what, vcpu, where, value = step
        cpu = self.reference.cpus[vcpu]
        if what == "store":
            self.rig.store(where, value)
        elif what == "hardware":
            entry = self.rig.peek(where)
            self.rig.hardware(where, entry | A | D if entry & 1 else entry)
        elif what == "invlpg":
            self.rig.oracle.event(vcpu, "INVLPG", where)
            self.reference.invlpg(cpu, where)
        elif what == "root":
            before, cpu.cr3 = cpu.cr3, where
            if not self.load_registers(cpu):
                cpu.cr3 = before
                return
            self.rig.oracle.event(vcpu, "CR3", where)
            self.reference.load_root(cpu, where)
        elif what == "fault":
            expected = self.reference.may_fault(cpu, where, value)
            taken = self.rig.faults(where, value, user=bool(value & 4), vcpu=vcpu)
            assert (taken != "wrong") == expected
            self.reference.fault(cpu, where)
        else:
            self.change_mode(vcpu, where)
        self.reference.settle()
        self.rig.oracle.check()

    def change_mode(self, vcpu: int, bit: int) -> None:
        cpu = self.reference.cpus[vcpu]
        if bit == WP:
            self.cr0[vcpu] ^= bit
            cpu.wp = not cpu.wp
            self.rig.oracle.event(vcpu, "CR0", self.cr0[vcpu])
            return
        if not self.load_registers(cpu):
            return
        self.cr4[vcpu] ^= bit
        if bit == PSE:
            cpu.pse = not cpu.pse
        else:
            cpu.pge = not cpu.pge
        self.reference.drop_all(cpu)
        self.rig.oracle.event(vcpu, "CR4", self.cr4[vcpu])

    def answers(self) -> list[tuple[tuple[int, int, int, bool, int], bool, bool]]:
        """Ask both about every access there is: (access, oracle's answer, reference's answer)."""
        return [
            (
                (vcpu, gva, kind, user, gfn),
                self.rig.uses(gva, gfn, kind, user=user, vcpu=vcpu) != "wrong",
                self.reference.may_use(cpu, gva, kind, user, gfn),
            )
            for vcpu, cpu in enumerate(self.reference.cpus)
            for gva in self.world.pages
            for gfn in self.world.frames
            for kind, user in ((0, True), (1, True), (2, True), (1, False), (0, False))
        ]


_SETTINGS = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.shows("C1")
@_WORLDS
@given(data=st.data())
@_SETTINGS
def test_an_access_is_accepted_exactly_if_some_cache_state_allows_it(
    world: World, data: st.DataObject
) -> None:
    pair = Pair(world)
    for step in data.draw(steps_in(world, hardware=False)):
        pair.do(step)
    assert [access for access, said, right in pair.answers() if said != right] == []


@pytest.mark.shows("C1")
@_WORLDS
@given(data=st.data())
@_SETTINGS
def test_no_legal_access_is_refused_when_walkers_set_accessed_and_dirty_bits(
    world: World, data: st.DataObject
) -> None:
    pair = Pair(world)
    for step in data.draw(steps_in(world, hardware=True)):
        if step[0] != "fault":
            pair.do(step)
    assert [access for access, said, right in pair.answers() if right and not said] == []


@_WORLDS
@given(data=st.data())
@settings(parent=_SETTINGS, max_examples=30)
def test_asking_between_the_steps_changes_no_answer(world: World, data: st.DataObject) -> None:
    pair, asked = Pair(world), Pair(world)
    for step in data.draw(steps_in(world, hardware=False)):
        pair.do(step)
        asked.do(step)
        asked.answers()
    assert asked.answers() == pair.answers()
