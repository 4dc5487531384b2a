"""Shootdowns: nothing stale is left when a call returns, nobody is asked who need not be."""

from __future__ import annotations

from collections import Counter

import pytest

from penumbra.guest.kernel import GUEST_BUGS, VECTOR_SHOOTDOWN, KernelOptions
from penumbra.guest.workloads import ShootdownStress
from penumbra.hw.formats import FORMATS, IA32, X86_64, FormatSpec
from penumbra.hw.operations import LoadControl, SendIpi, Store, Syscall
from tests.guest.flat_driver import FlatMachine
from tests.guest.scripts import ARENA, PAGE, RO, mmap, saw, script


@pytest.mark.shows("G4")
@pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("n_vcpus", [1, 2, 4, 8, 16])
def test_no_tlb_holds_anything_revoked_once_a_call_has_returned(
    spec: FormatSpec, n_vcpus: int
) -> None:
    for seed in range(2):
        options = KernelOptions(timer_period=700)
        machine = FlatMachine(
            spec,
            [ShootdownStress(threads=min(n_vcpus, 6), rounds=3)],
            n_vcpus,
            sticky=True,
            seed=seed,
            options=options,
        )
        assert (machine.run(2_000_000), machine.stale, machine.wrong) == ("finished", [], [])
        machine.check_all_returned()
        assert (machine.kernel.shootdown.n_requests > 0) == (n_vcpus > 1)


# The one that needs large pages has its test among theirs.
@pytest.mark.shows("G8")
@pytest.mark.parametrize("bug", sorted(GUEST_BUGS.keys() - {"promote-without-flush"}))
def test_each_bug_a_kernel_can_have_leaves_something_stale(bug: str) -> None:
    machine = FlatMachine(
        IA32,
        [ShootdownStress(threads=3, pages=8, rounds=6)],
        4,
        sticky=True,
        seed=1,
        quantum=8,
        ipi_latency=300,
        options=KernelOptions(timer_period=2000, bugs=frozenset([bug])),
    )
    machine.run(30_000)
    assert machine.stale


def test_an_unknown_bug_is_refused() -> None:
    options = KernelOptions(bugs=frozenset(["skip-lunch"]))
    with pytest.raises(ValueError, match="no such guest bug: skip-lunch"):
        FlatMachine(IA32, [script()], options=options)


@pytest.mark.shows("G4")
@pytest.mark.parametrize(("n_pages", "flushes"), [(32, (32, 0)), (33, (0, 1))])
def test_long_ranges_are_flushed_by_a_cr3_load(n_pages: int, flushes: tuple[int, int]) -> None:
    async def main() -> None:
        await mmap(ARENA, n_pages)
        for page in range(n_pages):
            await Store(ARENA + page * PAGE, 8, 1)
        await saw()
        await Syscall("mprotect", (ARENA, n_pages * PAGE, RO))
        await saw()

    machine = FlatMachine(X86_64, [script(main)], options=KernelOptions(timer_period=10**6))
    counts = []
    for _ in range(2):
        machine.run_until_mark("saw")
        counts.append(Counter(machine.vcpus[0].operations))
    machine.kernel.close()
    used = counts[1] - counts[0]
    assert (used["Invlpg"], used["LoadControl"]) == flushes


@pytest.mark.shows("G4")
def test_cpus_that_do_not_have_the_memory_loaded_are_not_asked() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))
        await mmap(ARENA, 4)
        for _ in range(20):
            await Store(ARENA, 8, 1)
            await Syscall("mprotect", (ARENA, PAGE, RO))
            await Syscall("mprotect", (ARENA, PAGE, 3))

    async def other() -> None:
        await mmap(ARENA, 1)
        for _ in range(200):
            await Store(ARENA, 8, 1)

    machine = FlatMachine(X86_64, [script(main, other)], 4, sticky=True)
    sent = [op for op in machine.trace_of(SendIpi) if op.vector == VECTOR_SHOOTDOWN]
    assert (sent, machine.stale) == ([], [])


@pytest.mark.shows("G5")
def test_idle_cpus_have_the_kernels_own_root_loaded() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))
        await saw()

    async def child() -> None:
        for _ in range(30):
            await Syscall("yield")

    machine = FlatMachine(X86_64, [script(main, child)], 3)
    kernel_root = machine.vcpus[0].cr3
    assert machine.run() == "finished"
    assert {vcpu.cr3 for vcpu in machine.vcpus} == {kernel_root}
    assert all(op.register == 3 for op in machine.trace_of(LoadControl))
