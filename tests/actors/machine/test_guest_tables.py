"""Whose tables a VCPU runs on, and threads that go from one VCPU to another, on whole machines."""

from __future__ import annotations

from collections import defaultdict

import pytest
from machines import SMALL_POOL, SMALL_STRESS, SMALL_SWITCHER, run_machine

from penumbra.actors.machine.machine import Machine
from penumbra.actors.observe.events import EventKind
from penumbra.guest.workloads.workload import Workload
from penumbra.hw.formats import PAGE_SHIFT

SCHEMES = ("native", "shootdown", "patch")


def seen_by(machine: Machine, kind: EventKind, column: str) -> dict[int, set[int]]:
    """Return, for each value of an event's column, the VCPUs it happened on."""
    columns = machine.observer.events.columns()
    found: dict[int, set[int]] = defaultdict(set)
    for of_kind, value, vcpu in zip(
        columns["kind"].tolist(), columns[column].tolist(), columns["vcpu"].tolist(), strict=True
    ):
        if of_kind == kind:
            found[value].add(vcpu)
    return dict(found)


@pytest.mark.shows("G1")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
def test_threads_of_a_process_share_one_root_and_processes_have_their_own(
    scheme: str, paging: str
) -> None:
    machine, _, verdict = run_machine(SMALL_STRESS, scheme, vcpus=3, paging=paging)
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    roots = users_roots(machine)
    assert any(len(vcpus) > 1 for vcpus in roots.values())
    machine, summary, _ = run_machine(SMALL_SWITCHER, scheme, vcpus=1, paging=paging)
    assert len(users_roots(machine)) == len(summary["processes"]) > 1
    for root in {*roots, *users_roots(machine)}:
        assert root >> PAGE_SHIFT < machine.memory.n_guest_frames  # ordinary guest memory


def users_roots(machine: Machine) -> dict[int, set[int]]:
    """Return the roots of processes; the kernel's own is what idle VCPUs have loaded."""
    roots = seen_by(machine, EventKind.CR3_LOAD, "arg0")
    return {root: vcpus for root, vcpus in roots.items() if root != min(roots)}


@pytest.mark.shows("G5")
@pytest.mark.parametrize("tlb", ["hardware", "software"])
@pytest.mark.parametrize("workload", [SMALL_POOL, SMALL_STRESS], ids=lambda workload: workload.name)
def test_a_thread_that_moves_to_another_vcpu_sees_its_memory(workload: Workload, tlb: str) -> None:
    left = []
    for scheme in SCHEMES:
        machine, summary, verdict = run_machine(
            workload, scheme, vcpus=2, timer_period=300, quantum=100, tlb=tlb
        )
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        vcpus_of = seen_by(machine, EventKind.THREAD_SWITCH, "arg0")
        assert any(len(vcpus) == 2 for vcpus in vcpus_of.values())
        assert summary["counters"]["interrupt"] > 10
        left.append([(p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]])
    assert left[0] == left[1] == left[2]
