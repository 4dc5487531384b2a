"""Sibling CPUs on one TLB: `[machine] smt = 2`."""

from __future__ import annotations

import pytest
from machines import FAMILIES, SMALL_STRESS, WORKLOADS, run_machine

from penumbra.actors.machine.config import MachineConfig


@pytest.mark.shows("H7")
@pytest.mark.parametrize("scheme", FAMILIES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_siblings_on_one_tlb_stay_in_the_allowed_set_and_compute_the_same(
    scheme: str, workload: str
) -> None:
    alone, own, verdict_alone = run_machine(WORKLOADS[workload], scheme, vcpus=3)
    machine, shared, verdict = run_machine(WORKLOADS[workload], scheme, vcpus=3, smt=2)
    tlbs = [cpu.tlb for cpu in machine.cpus]
    assert tlbs[0] is tlbs[1] is not tlbs[2]
    assert len({id(cpu.tlb) for cpu in alone.cpus}) == 3
    assert verdict is not None
    assert verdict_alone is not None
    assert verdict.coherent, verdict.explain()
    assert shared["progress"] == own["progress"]
    assert shared["processes"] == own["processes"]
    assert shared["counters"]["references"] == own["counters"]["references"]
    if workload == SMALL_STRESS.name:  # its threads run on siblings at once
        assert shared["counters"]["tlb_miss"] != own["counters"]["tlb_miss"]
    for tlb in tlbs:
        tlb.check()


@pytest.mark.parametrize("smt", [0, 3, -1, 8])
def test_a_number_of_siblings_there_is_not_is_refused(smt: int) -> None:
    assert MachineConfig(smt=smt).problem() == f"machine.smt is {smt}: must be 1, 2 or 4"
