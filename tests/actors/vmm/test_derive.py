"""What a shadow leaf is, given a guest leaf: a table of cases."""

from __future__ import annotations

import pytest

from penumbra.actors.core import Matrix
from penumbra.actors.vmm.derive import NOWHERE, derive_leaf, link_rights
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.formats import (
    CR4_PGE,
    EFER_NXE,
    IA32,
    NX,
    PCD,
    PS,
    PWT,
    X86_64,
    A,
    D,
    FormatSpec,
    G,
    P,
    U,
    W,
)
from penumbra.hw.memory import Ram

TARGET, TRACED, BEYOND = 3, 4, 100
ALL = P | W | U | A | D


def derive(
    spec: FormatSpec, flags: int, target: int = TARGET, *, nxe: bool = True, pge: bool = True
) -> tuple[int, int]:
    """Return the frame the shadow leaf maps, as a guest frame if it is one, and its flags.

    (0, 0) is an entry that maps nothing.
    """
    memory = MemoryManagement(Ram(16), 8, identity=False, seed=1)
    registers = GuestRegisters(cr4=CR4_PGE * pge, efer=EFER_NXE * nxe)
    traces = WriteTraces(Matrix(1))
    traces.place(TRACED)
    value = derive_leaf(spec, target << 12 | flags, target, memory, traces, registers)
    if not value:
        return 0, 0
    pfn = (value & spec.frame_mask) >> 12
    return memory.guest_of.get(pfn, pfn), value & ~spec.frame_mask


@pytest.mark.shows("V4", "V5", "I4", "Fig 7")
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    ("flags", "derived"),
    [
        (ALL, ALL),
        (ALL & ~U, ALL & ~U),
        (ALL & ~W, ALL & ~W),
        (ALL & ~D, ALL & ~W),  # the first write exits, so that D can be set
        (ALL | PWT | PCD | 0xE00, ALL),  # cache and free bits are the guest's own
        (ALL | PS, ALL),  # at the last level this is PAT
        (ALL | G, ALL | G),
        (P | A, P | A | D),
    ],
)
def test_a_leaf_has_the_guests_rights_and_writes_only_when_dirty(
    spec: FormatSpec, flags: int, derived: int
) -> None:
    assert derive(spec, flags) == (TARGET, derived)


@pytest.mark.shows("V5", "I4")
@pytest.mark.parametrize("flags", [0, ALL & ~P, ALL & ~A, (ALL | NX) & ~P])
def test_what_is_absent_or_was_never_accessed_derives_nothing(flags: int) -> None:
    assert derive(X86_64, flags) == (0, 0)


@pytest.mark.shows("V6")
def test_a_traced_frame_is_never_writable() -> None:
    assert derive(X86_64, ALL, TRACED) == (TRACED, ALL & ~W)


@pytest.mark.shows("H3")
def test_reserved_bits_and_nx_without_nxe_derive_nothing() -> None:
    assert derive(X86_64, ALL | 1 << 45) == (0, 0)
    assert derive(X86_64, ALL | NX, nxe=False) == (0, 0)
    assert derive(X86_64, ALL | NX) == (TARGET, ALL | NX)


def test_global_counts_only_where_the_guest_has_enabled_it() -> None:
    assert derive(IA32, ALL | G, pge=False) == (TARGET, ALL)


@pytest.mark.shows("H1", "V11")
def test_a_frame_the_vm_has_not_maps_to_nowhere() -> None:
    assert derive(IA32, ALL, BEYOND) == (NOWHERE, ALL)


@pytest.mark.shows("V4")
def test_an_upper_entry_mirrors_its_guests_rights_and_nothing_else() -> None:
    entry = 5 << 12 | ALL | G | PWT
    assert link_rights(IA32, entry) == W | U
    assert link_rights(IA32, entry & ~W) == U
    assert link_rights(X86_64, entry | NX) == W | U | NX
