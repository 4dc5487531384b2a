"""Whole machines under virtual TLBs: coherent, equal to bare hardware, and at which exits."""

from __future__ import annotations

from typing import Any

import pytest
from machines import (
    SMALL_CHURN,
    SMALL_POOL,
    SMALL_STRESS,
    SMALL_SWITCHER,
    WORKLOADS,
    run_machine,
    scheme_with,
)

from penumbra.actors.machine.machine import Machine
from penumbra.guest.workloads.workload import Workload, named_workload

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("vtlb", {"sharing": "vm"}),
    "shared, eager": ("vtlb-eager", {"sharing": "vm"}),
    "drops all": ("vtlb", {"drop": "all"}),
    "one level per fault": ("vtlb", {"levels": "one"}),
    "prefetching": ("vtlb", {"prefetch": 4}),
    "working set, little storage": ("vtlb-smp", {"working_set": 4, "shadow_pages": 64}),
    "little storage": ("vtlb", {"shadow_pages": 64}),
    "little storage, eager, shared": ("vtlb-eager", {"shadow_pages": 64, "sharing": "vm"}),
}


def left_by(summary: dict[str, Any]) -> tuple[Any, ...]:
    return summary["ended"], summary["progress"], summary["processes"]


def run_coherent(workload: Workload, scheme: Any, **config: Any) -> tuple[Machine, dict[str, Any]]:
    machine, summary, verdict = run_machine(workload, scheme, **config)
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert summary["ended"] == "finished"
    return machine, summary


@pytest.mark.shows("I1", "I4", "S3", "C5", "VTLBc 1", "VTLBc 14", "VTLBc 24", "VTLBc 28")
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize(
    ("paging", "vcpus", "tlb", "smt"), [("ia32", 1, 8, 1), ("x86-64", 4, 1024, 2)]
)
def test_every_workload_is_coherent_and_leaves_the_memory_of_bare_hardware(
    workload: str, paging: str, vcpus: int, tlb: int, smt: int
) -> None:
    config = {"paging": paging, "vcpus": vcpus, "tlb_entries": tlb, "tlb_ways": 4, "smt": smt}
    _, native = run_coherent(WORKLOADS[workload], "native", **config)
    for scheme in ("vtlb", "vtlb-eager", "vtlb-smp"):
        _, summary = run_coherent(WORKLOADS[workload], scheme, **config)
        assert left_by(summary) == left_by(native)


@pytest.mark.shows("I1", "I10", "I11", "S1")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", [SMALL_STRESS.name, SMALL_SWITCHER.name])
def test_every_option_is_coherent_and_leaves_the_same_memory(kind: str, workload: str) -> None:
    preset, options = KINDS[kind]
    config = {"vcpus": 3, "tlb_entries": 16, "tlb_ways": 4}
    _, native = run_coherent(WORKLOADS[workload], "native", **config)
    _, summary = run_coherent(WORKLOADS[workload], scheme_with(preset, **options), **config)
    assert left_by(summary) == left_by(native)


@pytest.mark.shows("I3", "I11", "ET13")
def test_sixteen_vcpus_have_pairs_of_their_own() -> None:
    stress = named_workload("shootdown-stress", threads=16, rounds=2, pages=2)
    machine, summary = run_coherent(stress, "vtlb", vcpus=16, tlb_entries=64)
    roots = {h.root.pfn for vtlb in machine.submms for h in vtlb.state.pair.both}  # type: ignore[attr-defined]
    assert len(roots) == 32
    assert summary["counters"]["hidden_fault"] > 0


@pytest.mark.shows("I1", "I2", "VTLBc 2", "VTLBc 3", "VTLBc 16", "VTLBc 25", "Fig 5 504 506")
def test_no_store_to_a_guest_table_exits_and_every_event_does() -> None:
    _, native = run_coherent(SMALL_CHURN, "native", vcpus=2)
    _, patch = run_coherent(SMALL_CHURN, "patch", vcpus=2)
    machine, summary = run_coherent(SMALL_CHURN, "vtlb", vcpus=2)
    exits, counters = summary["exits"], summary["counters"]
    assert patch["exits"]["traced store"] > 0
    assert "traced store" not in exits
    assert not {"emulated_store", "trace_placed", "patch_posted", "shootdown"} & set(counters)
    assert (machine.traces.n_placed, summary["matrix"]) == (0, [])
    assert exits["invlpg"] == native["counters"]["invlpg"]
    assert exits["cr3_load"] == native["counters"]["cr3_load"]
    assert exits["privilege"] > 2 * counters["syscall"] - 1
    assert exits["hidden fault"] == counters["hidden_fault"] > 0
    assert exits["true fault"] == counters["guest_fault"] == native["counters"]["guest_fault"]
    assert "privilege" not in patch["exits"]


@pytest.mark.shows("I9", "VTLBc 6", "VTLBc 30")
@pytest.mark.parametrize("workload", WORKLOADS)
def test_eager_filling_has_fewer_hidden_faults_than_lazy_on_the_same_guest(workload: str) -> None:
    lazy, eager = (
        run_coherent(WORKLOADS[workload], scheme, vcpus=2)[1] for scheme in ("vtlb", "vtlb-eager")
    )
    assert lazy["progress"] == eager["progress"]
    assert eager["counters"]["hidden_fault"] < lazy["counters"]["hidden_fault"] / 2


@pytest.mark.shows("I7")
def test_on_context_switches_a_cached_shadow_pays_and_a_virtual_tlb_fills_anew() -> None:
    switcher = named_workload("process-switcher", processes=4, regions=8, turns=12)
    _, patch = run_coherent(switcher, "patch", vcpus=1)
    _, vtlb = run_coherent(switcher, "vtlb", vcpus=1)
    _, kept = run_coherent(switcher, "vtlb-smp", vcpus=1)
    assert vtlb["counters"]["cr3_load"] == patch["counters"]["cr3_load"]
    assert 3 * patch["counters"]["hidden_fault"] < vtlb["counters"]["hidden_fault"]
    assert 3 * kept["counters"]["hidden_fault"] < vtlb["counters"]["hidden_fault"]
    assert "traced store" not in kept["exits"]


@pytest.mark.shows("I4", "G2")
@pytest.mark.parametrize("scheme", ["vtlb", "vtlb-eager", "vtlb-smp"])
def test_a_guest_that_swaps_by_accessed_bits_chooses_as_on_bare_hardware(scheme: str) -> None:
    """Its pager clears A and flushes; equal progress means it saw the same bits."""
    thrash = named_workload("swap-thrash", processes=2, threads=2, pages=24, rounds=2)
    small: dict[str, Any] = {"user_frames": 16, "disk_mib": 1, "disk_latency": 700}
    for vcpus in (1, 3):
        _, native = run_coherent(thrash, "native", vcpus=vcpus, **small)
        _, summary = run_coherent(thrash, scheme, vcpus=vcpus, **small)
        assert left_by(summary) == left_by(native)
        assert summary["counters"]["dma"] == native["counters"]["dma"] > 50


@pytest.mark.shows("ET13", "I11")
def test_one_pair_for_vcpus_with_different_roots_is_refused_by_the_checker() -> None:
    verdicts = []
    for errata in ((), ("ET13",)):
        _, _, verdict = run_machine(
            SMALL_SWITCHER, scheme_with("vtlb", errata=errata), vcpus=3, quantum=1000
        )
        assert verdict is not None
        verdicts.append(verdict.coherent)
    assert verdicts == [True, False]


@pytest.mark.shows("I4")
@pytest.mark.parametrize("scheme", ["vtlb", "vtlb-eager"])
def test_hardware_that_faults_by_a_cached_entrys_rights_is_served_as_well(scheme: str) -> None:
    _, native = run_coherent(SMALL_STRESS, "native", vcpus=3)
    _, summary = run_coherent(SMALL_STRESS, scheme, vcpus=3, spurious_faults=True)
    assert left_by(summary) == left_by(native)


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (run_coherent(SMALL_POOL, "vtlb-eager", seed=7, vcpus=3)[1] for _ in range(2))
    assert first == second
