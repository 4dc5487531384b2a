"""Whole machines under schemes the texts do not have: what exits, what does not, and all right."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from machines import (
    SMALL_CHURN,
    SMALL_STORM,
    SMALL_STRESS,
    SMALL_SWITCHER,
    run_machine,
    scheme_with,
)

from penumbra.actors.check import Verdict
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import Scheme
from penumbra.guest.workloads.workload import named_workload

LEAVES = scheme_with("out-of-sync", shadow_pages=64, unsync=2, prefetch=8, prefetch_invlpg=True)
APART = scheme_with("out-of-sync", share_roles=False, root_cache=1)
SCHEMES = {"nested": scheme_with("nested"), "few leaves": LEAVES, "apart": APART}


def right(
    run: tuple[Machine, dict[str, Any], Verdict | None],
) -> tuple[dict[str, Any], dict[str, int]]:
    """Assert that a run was coherent and right; return its exits and counters."""
    _, summary, verdict = run
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    assert {process["ended"] for process in summary["processes"]} == {"exit 0"}
    return summary["exits"], summary["counters"]


@pytest.mark.shows("S2", "S3", "V3")
def test_nested_paging_exits_for_no_table_no_event_and_no_fault() -> None:
    exits, counters = right(run_machine(SMALL_STORM, "nested", vcpus=2))
    assert counters["invlpg"] > 0
    assert counters["cr3_load"] > 0
    assert counters["guest_fault"] > 0
    assert exits.keys() <= {"interrupt", "ipi", "timer", "hlt", "mode_change"}
    assert not {"hidden_fault", "emulated_store", "trace_placed"} & counters.keys()
    bare = right(run_machine(SMALL_STORM, "native", vcpus=2))[1]
    for name in ("walk_read", "tlb_miss", "references"):
        assert counters[name] == bare[name], "one walk for one walk"
    # Four reads for each guest entry, and for the page at the end of a walk that finds one.
    found, rest = divmod(counters["second_read"] - 4 * counters["walk_read"], 4)
    assert rest == 0
    assert counters["walk"] / 2 < found < counters["walk"]
    assert bare["second_read"] == 0


@pytest.mark.shows("S2", "S3")
@pytest.mark.parametrize("workload", [SMALL_STORM, SMALL_CHURN], ids=lambda w: w.name)
def test_leaf_tables_out_of_sync_save_most_exits_of_traced_stores(workload: Any) -> None:
    traced, _ = right(run_machine(workload, "patch"))
    exits, counters = right(run_machine(workload, "out-of-sync"))
    assert exits["traced store"] * 2 < traced["traced store"]
    assert counters["unsync"] > 0
    assert counters["resync"] + counters["resync_entry"] > 0


@pytest.mark.shows("S1", "S3", "V6")
def test_the_traces_of_tables_that_are_cleared_entry_by_entry_are_given_up() -> None:
    storm = named_workload("fork-storm")
    kept, before = right(run_machine(storm, "patch"))
    given_up, counters = right(run_machine(storm, "patch-flood"))
    assert counters["trace_removed"] > before.get("trace_removed", 0)
    assert given_up["traced store"] < kept["traced store"]


@pytest.mark.shows("S1", "S3")
def test_previous_roots_are_what_saves_hidden_faults_when_processes_take_turns() -> None:
    hidden = [
        right(run_machine(SMALL_SWITCHER, scheme_with("patch", root_cache=n)))[1]["hidden_fault"]
        for n in (None, 1, 0)
    ]
    assert hidden[0] < hidden[1] <= hidden[2]


@pytest.mark.shows("S2", "P10", "H4", "H7")
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
@pytest.mark.parametrize(
    ("vcpus", "smt", "tlb", "paging"),
    [(1, 1, (8, 4), "ia32"), (3, 2, (1536, 12), "x86-64"), (16, 2, (8, 4), "x86-64")],
)
def test_small_and_large_machines_run_right(
    scheme: Scheme, vcpus: int, smt: int, tlb: tuple[int, int], paging: str
) -> None:
    for workload in (SMALL_STRESS, SMALL_CHURN):
        how: dict[str, Any] = {
            "vcpus": vcpus, "smt": smt, "tlb_entries": tlb[0], "tlb_ways": tlb[1],
            "paging": paging, "quantum": 300, "timer_period": 2000,
        }  # fmt: skip
        run = run_machine(workload, scheme, **how)
        right(run)
        bare = run_machine(workload, "native", check=False, **how)
        assert run[1]["progress"] == bare[1]["progress"]
        if workload is SMALL_CHURN:  # the other one reads what is being taken away
            assert run[1]["processes"] == bare[1]["processes"]


@pytest.mark.shows("S2")
def test_a_leaf_taken_at_invlpg_from_a_table_out_of_sync_is_known_to_be_behind() -> None:
    preset = scheme_with("out-of-sync", prefetch_invlpg=True)
    scheme = msgspec.structs.replace(preset, propagate="patch", apply="invalidate")
    _, summary, verdict = run_machine(SMALL_STRESS, scheme, vcpus=1)  # and every part is checked
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert summary["counters"]["prefetch"]
