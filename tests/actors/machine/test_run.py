"""A whole machine, from configuration to summary: right, coherent, and the same every time."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from machines import FAMILIES, SMALL_STRESS, WORKLOADS, run_machine, scheme_with

from penumbra.hw.costs import CostProfile

SCHEMES = FAMILIES


def memory_of(summary: dict[str, Any]) -> list[tuple[int, str, int, str]]:
    return [(p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]]


def assert_right(summary: dict[str, Any]) -> None:
    assert summary["ended"] == "finished"
    assert summary["marks"] == []
    assert {p["ended"] for p in summary["processes"]} == {"exit 0"}


@pytest.mark.shows("S3", "C1", "C5", "G3", "G4", "S2", "G9")
@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_scheme_is_judged_coherent_and_leaves_the_memory_of_native(
    name: str, paging: str
) -> None:
    left = {}
    for scheme in SCHEMES:
        _, summary, verdict = run_machine(WORKLOADS[name], scheme, paging=paging)
        assert verdict is not None
        assert verdict.coherent, verdict
        assert verdict.n_checked > 0
        assert_right(summary)
        left[scheme] = memory_of(summary), summary["progress"]
    assert left["shootdown"] == left["native"]
    assert left["patch"] == left["native"]


@pytest.mark.shows("P10", "V5", "H4")
@pytest.mark.parametrize("vcpus", [1, 2, 8, 16])
@pytest.mark.parametrize(
    ("tlb", "psc", "capacity", "quantum"), [((8, 4), 0, 1, 50), ((1536, 12), 16, 4, 20_000)]
)
def test_small_and_large_machines_run_right(
    vcpus: int, tlb: tuple[int, int], psc: int, capacity: int, quantum: int
) -> None:
    for workload in WORKLOADS.values():
        _, summary, verdict = run_machine(
            workload,
            scheme_with("patch", capacity=capacity),
            vcpus=vcpus,
            tlb_entries=tlb[0],
            tlb_ways=tlb[1],
            psc_slots=psc,
            quantum=quantum,
            timer_period=2000,
        )
        assert verdict is not None
        assert verdict.coherent, verdict
        assert_right(summary)


@pytest.mark.shows("P3", "P8")
@pytest.mark.parametrize(
    "options",
    [
        {"tell_all": True},
        {"shadow_pages": 64},
        {"flood": 4},
        {"prefetch": 8, "prefetch_invlpg": True},
        {"root_cache": 0},
        {"share_roles": False, "root_cache": 2},
        {"order": "void_on_coalesce"},
        {"order": "no_coalescing"},
    ],
    ids=str,
)
def test_options_of_the_patch_scheme_change_costs_and_not_results(options: dict[str, Any]) -> None:
    _, base, _ = run_machine(SMALL_STRESS, "patch")
    _, summary, verdict = run_machine(SMALL_STRESS, scheme_with("patch", **options))
    assert verdict is not None
    assert verdict.coherent, verdict
    assert memory_of(summary) == memory_of(base)
    assert summary["progress"] == base["progress"]


@pytest.mark.shows("K5")
def test_the_same_seed_gives_the_same_run_on_both_loops_and_without_the_checker() -> None:
    for scheme in SCHEMES:
        runs = [
            run_machine(SMALL_STRESS, scheme, loop="trio"),
            run_machine(SMALL_STRESS, scheme, loop="asyncio"),
            run_machine(SMALL_STRESS, scheme, check=False),
        ]
        events = [machine.observer.events.columns() for machine, _, _ in runs]
        for (_, summary, _), columns in zip(runs[1:], events[1:], strict=True):
            assert summary == runs[0][1]
            assert columns.keys() == events[0].keys()
            for name, column in columns.items():
                assert (column == events[0][name]).all(), name


def test_another_seed_gives_another_schedule() -> None:
    progress = {
        run_machine(SMALL_STRESS, "patch", seed=seed, quantum=100)[1]["progress"]
        for seed in range(6)
    }
    assert len(progress) > 1


_ENGINE_SCRIPT = """
import json, sys
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.run import simulate
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.workload import named_workload
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.hw.costs import CostProfile
result = simulate(
    machine=MachineConfig(), scheme=PRESETS[sys.argv[1]], costs=CostProfile(), seed=5,
    workload=named_workload("fork-storm", depth=1, pages=4), check=False,
)
columns = {name: column.tolist() for name, column in result.events.columns().items()}
print(json.dumps([result.engine, result.summary, columns], sort_keys=True))
"""


@pytest.mark.shows("H2")
def test_the_compiled_and_the_plain_engine_give_the_same_run() -> None:
    out, schemes = {}, ("native", "patch")
    for engine in ("numba", "plain"):
        for scheme in schemes:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _ENGINE_SCRIPT, scheme],
                env={**os.environ, "PENUMBRA_ENGINE": engine},
                capture_output=True,
                text=True,
                check=True,
            )
            name, rest = done.stdout.split(",", 1)
            assert engine in name
            out[engine, scheme] = rest
    for scheme in schemes:
        assert out["numba", scheme] == out["plain", scheme]


@pytest.mark.shows("H11")
def test_the_cost_of_a_run_is_its_counters_at_their_prices() -> None:
    for scheme in SCHEMES:
        _, summary, _ = run_machine(SMALL_STRESS, scheme)
        assert summary["cost"] == CostProfile().cost(summary["counters"])


@pytest.mark.shows("H11")
@pytest.mark.parametrize("scheme", ["shootdown", "patch", "vtlb", "nested"])
def test_costs_change_what_a_run_costs_and_nothing_that_it_does(scheme: str) -> None:
    names = [name for name in CostProfile.__struct_fields__ if name != "source"]
    profiles = [CostProfile(), CostProfile(source="dear", **dict.fromkeys(names, 10**9))]
    runs = []
    for costs in profiles:
        machine, said, _ = run_machine(SMALL_STRESS, scheme, vcpus=3, costs=costs)
        events = machine.observer.events.columns()
        total = said.pop("cost")
        assert total == costs.cost(said["counters"])
        assert sum(vcpu.pop("cost") for vcpu in said["vcpu"]) == total
        del events["cost"]
        runs.append((said, {name: column.tolist() for name, column in events.items()}))
    assert runs[0] == runs[1]


@pytest.mark.shows("K1")
def test_the_task_tree_holds_one_task_for_each_part() -> None:
    machine, _, _ = run_machine(SMALL_STRESS, "patch", vcpus=2)
    names = [actor.task for actor in machine.tree.actors]
    parts = [
        f"machine/{part}-{i}" for part in ("cpu", "vcpu", "producer", "consumer") for i in (0, 1)
    ]
    assert len(names) == len(set(names))
    assert set(parts) <= set(names)
    # When the guest has finished only the idle threads are left, one per VCPU.
    assert [n for n in names if n not in parts] == ["machine/thread-0", "machine/thread-1"]


@pytest.mark.shows("S2")
def test_native_has_no_monitor_and_no_channels() -> None:
    machine, summary, _ = run_machine(SMALL_STRESS, "native", vcpus=2)
    assert not machine.submms
    assert summary["matrix"] == []
    assert summary["exits"] == {}
