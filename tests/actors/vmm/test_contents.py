"""What a VCPU's derived tables hold can be listed; who shares one holds what the other does.

Source: A40 ¶34 (a virtual TLB shared by VCPUs), ¶38 (VTLB 294).
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from machines import SMALL_STORM, run_machine, scheme_with

from penumbra.actors.vmm.contents import Translation, translations
from penumbra.actors.vmm.derive import NOWHERE
from penumbra.actors.vmm.schemes import PRESETS, Scheme
from penumbra.hw.formats import IA32, NX, PAE, PS, X86_64, FormatSpec, G, P, U, W
from penumbra.hw.memory import Ram
from penumbra.hw.streams import FETCH, READ, WRITE

from .bench import USED, Bench, patch
from .vtlb.bench import FRAME, GVA, NEIGHBOUR, OTHER, VtlbBench

pytestmark = pytest.mark.shows("V1")

both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
SHADOWED = [name for name, one in PRESETS.items() if one.shadow not in ("none", "nested")]


def translated(held: list[Translation], gva: int) -> set[tuple[str, int, bool]]:
    """Return for whom, to which frame and whether writable an address is translated."""
    return {(one.serves, one.pfn, one.writable) for one in held if one.gva == gva}


@both_formats
@pytest.mark.parametrize("sharing", ["vcpu", "vm"])
def test_two_vcpus_on_one_virtual_tlb_hold_the_same_and_apart_each_its_own(
    spec: FormatSpec, sharing: str
) -> None:
    bench = VtlbBench(spec, n_vcpus=2, sharing=sharing)
    bench.map(bench.root, GVA, FRAME)
    bench.map(bench.root, NEIGHBOUR, OTHER)
    bench.begin()
    first, second = bench.vtlbs
    assert (first.entries(), second.entries()) == ([], []), "it starts empty, as a TLB does"
    bench.access(0, GVA)
    pfn, shared = bench.memory.frame_view[FRAME], sharing == "vm"
    assert {(who, frame) for who, frame, _ in translated(first.entries(), GVA)} == {
        ("user", pfn), ("supervisor", pfn),
    }  # fmt: skip
    assert (second.entries() == first.entries()) == shared
    assert bool(second.entries()) == shared
    bench.access(1, NEIGHBOUR)
    assert bool(translated(first.entries(), NEIGHBOUR)) == shared
    bench.invlpg(1, GVA)
    assert bool(translated(first.entries(), GVA)) != shared, "what one drops is gone for both"
    assert not translated(second.entries(), GVA)
    bench.check()


@both_formats
@pytest.mark.parametrize("shadow", ["per-cpu", "shared"])
def test_two_vcpus_on_one_shadow_hold_the_same_and_apart_each_its_own(
    spec: FormatSpec, shadow: Any
) -> None:
    bench = Bench(spec, msgspec.structs.replace(patch(), shadow=shadow))
    root, other = bench.frame(), bench.frame()
    bench.map(root, GVA, FRAME)
    bench.map(other, NEIGHBOUR, OTHER)
    bench.start(root)
    bench.access(0, GVA)
    held, seen = (submm.entries() for submm in bench.submms)
    assert translated(held, GVA) == {("both", bench.memory.frame_view[FRAME], True)}
    assert seen == (held if shadow == "shared" else [])
    bench.load_cr3(1, other)
    bench.access(1, NEIGHBOUR)
    held, seen = (submm.entries() for submm in bench.submms)
    assert translated(held, GVA)
    assert not translated(held, NEIGHBOUR), "another root is another content"
    assert translated(seen, NEIGHBOUR)
    bench.check()


@both_formats
def test_rights_are_those_the_hardware_grants(spec: FormatSpec) -> None:
    bench = Bench(spec, n_vcpus=1)
    root = bench.frame()
    readable = USED & ~W
    for i, flags in enumerate((USED, readable, USED & ~U, USED | NX if spec.has_nx else USED)):
        bench.map(root, GVA + i * 0x1000, FRAME + i, flags)
    bench.start(root)
    for i in range(4):
        bench.access(0, GVA + i * 0x1000, READ, user=i != 2)
    held = bench.submms[0].entries()
    assert [one.gva for one in held] == [GVA + i * 0x1000 for i in range(4)]
    for one in held:
        for kind, user in ((READ, True), (WRITE, True), (FETCH, True), (WRITE, False)):
            pfn = bench.cpus[0].translate(one.gva, kind, user)
            allowed = one.user or not user
            allowed &= kind != WRITE or one.writable
            allowed &= kind != FETCH or one.executable
            assert pfn == (one.pfn if allowed else -1), (one, kind, user)


def test_large_pages_upper_halves_and_registers_are_read_as_the_format_has_them() -> None:
    ram = Ram(8)
    ram.store(0x1000 + 511 * 8, 8, 0x2000 | P | W | U)
    ram.store(0x2000, 8, 0x3000 | P | U)
    ram.store(0x3000 + 8, 8, 0x40_0000 | P | W | U | PS | G | NX)
    upper = ((1 << 64) - (1 << 39)) | 0x20_0000
    wanted = Translation(upper, 512, 0x400, False, True, False, is_global=True)
    assert translations(X86_64, ram, 0x1000) == [wanted]
    ram.store(0x4000 + 24, 8, 0x5000 | P)
    ram.store(0x5000, 8, 0x6000 | P | W | U)
    ram.store(0x6000, 8, 0x7000 | P | W)
    assert translations(PAE, ram, 0x4000) == [Translation(3 << 30, 1, 7, True, False, True)]


@pytest.mark.parametrize("name", [*SHADOWED, "vtlb shared"])
def test_in_a_run_each_vcpu_holds_what_its_cpu_walks_and_nothing_of_anybody_elses(
    name: str,
) -> None:
    scheme: Scheme | str = scheme_with("vtlb", sharing="vm") if name == "vtlb shared" else name
    machine, _, _ = run_machine(SMALL_STORM, scheme, vcpus=2, max_progress=5000)
    contents = [submm.entries() for submm in machine.submms]
    assert any(contents)
    for cpu, held in zip(machine.cpus, contents, strict=True):
        for one in held:
            assert one.pfn in machine.memory.guest_of or one.pfn == NOWHERE
        cpu.flush_all()
        active = [one for one in held if one.user and one.serves != "supervisor"]
        if all(one.serves == "both" for one in held):
            for one in active:
                assert cpu.translate(one.gva, READ, True) == one.pfn


def test_without_derived_tables_nobody_holds_anything() -> None:
    for scheme in ("native", "native-patch", "nested"):
        machine, _, _ = run_machine(SMALL_STORM, scheme, vcpus=2, max_progress=5000)
        assert machine.submms == []
