"""Several VMs, and more VCPUs than CPUs, on one kernel. Source: A40 ¶45-52, Fig. 5."""

from __future__ import annotations

from typing import Any

import anyio
import numpy as np
import pytest
from machines import CORE, FAMILIES, SMALL_CHURN, SMALL_STORM, SMALL_STRESS

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.host import Host
from penumbra.actors.machine.run import RunResult, simulate
from penumbra.actors.machine.several import build_rig
from penumbra.actors.observe.events import EventKind
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.workload import Workload
from penumbra.hw import mmu_layout as m
from penumbra.hw.costs import CostProfile

pytestmark = pytest.mark.shows("V7")

SHAPES: dict[str, dict[str, Any]] = {
    "four VCPUs on two CPUs": {"vcpus": 4, "cpus": 2, "slice": 5000, "quantum": 1000},
    "three VMs on two CPUs": {"vcpus": 2, "cpus": 2, "vms": 3, "slice": 2000, "quantum": 500},
    "two VMs of three on one": {"vcpus": 3, "cpus": 1, "vms": 2, "slice": 900, "tlb_entries": 8},
    "VMs on threads of a core": {
        "vcpus": 2,
        "cpus": 4,
        "vms": 4,
        "smt": 2,
        "slice": 900,
        "quantum": 300,
    },
}


def run(workload: Workload, scheme: str, seed: int = 3, **config: Any) -> RunResult:
    return simulate(
        machine=MachineConfig(**config), scheme=PRESETS[scheme], workload=workload,
        costs=CostProfile(), seed=seed,
    )  # fmt: skip


def build_host(scheme: str = "patch", **config: Any) -> Host:
    rig = build_rig(MachineConfig(**config), PRESETS[scheme], SMALL_STRESS, CostProfile(), 3)
    host = getattr(rig.run, "__self__", None)
    assert isinstance(host, Host)
    return host


@pytest.mark.shows("S3", "C5", "VTLB Fig 1", "G5")
@pytest.mark.parametrize(
    ("shape", "workload", "schemes"),
    [
        (shape, workload, FAMILIES if (row + column) % 3 == 0 else CORE)
        for row, shape in enumerate(SHAPES)
        for column, workload in enumerate([SMALL_STORM, SMALL_STRESS, SMALL_CHURN])
    ],
    ids=lambda value: (
        getattr(value, "name", None) or (value if isinstance(value, str) else len(value))
    ),
)
def test_every_scheme_ends_coherent_at_equal_progress_and_memory(
    shape: str, workload: Workload, schemes: tuple[str, ...]
) -> None:
    runs = {scheme: run(workload, scheme, **SHAPES[shape]) for scheme in schemes}
    seen = set()
    for scheme, result in runs.items():
        assert result.summary["ended"] == "finished", scheme
        assert result.verdict is not None
        assert result.verdict.coherent, f"{scheme}: {result.verdict.explain()}"
        digests = tuple(record["digest"] for record in result.summary["processes"])
        seen.add((result.summary["progress"], digests))
    assert len(seen) == 1


def test_a_world_switch_is_an_event_with_the_cpu_and_a_counter() -> None:
    result = run(SMALL_STRESS, "patch", vcpus=2, cpus=1, vms=2, slice=500)
    columns = result.events.columns()
    switches = columns["kind"] == EventKind.WORLD_SWITCH
    assert switches.sum() == result.summary["counters"]["world_switch"] > 10
    assert set(columns["vm"]) == {0, 1}
    assert set(columns["cpu"]) == {0}
    on_two = run(SMALL_STRESS, "patch", vcpus=4, cpus=2, slice=500, quantum=200).events.columns()
    moved = [set(on_two["cpu"][on_two["vcpu"] == vcpu]) == {0, 1} for vcpu in range(4)]
    assert any(moved), "a VCPU moves between CPUs"


def test_what_the_cpus_counted_is_shared_out_among_the_vcpus() -> None:
    host = build_host(vcpus=2, cpus=2, vms=2, slice=700)
    anyio.run(host.run)
    assert host.hardware is not None
    counted = np.sum([cpu.registers for cpu in host.hardware.cpus], axis=0)
    total: dict[str, int] = {}
    for machine in host.machines:
        for vcpu in range(2):
            for name, n in machine.observer.hardware(vcpu).items():
                total[name] = total.get(name, 0) + n
    assert total["tlb_miss"] == counted[m.R_MISSES] > 0
    assert total["walk_read"] == counted[m.R_WALK_READS] > 0


@pytest.mark.shows("K1", "A40 Fig 5")
def test_each_cpu_is_one_task_and_each_vm_has_its_own() -> None:
    host = build_host(vcpus=2, cpus=1, vms=2, slice=700)
    anyio.run(host.run)
    names = [actor.task.partition("/")[2] for actor in host.tree.actors]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("cpu")] == ["cpu-0"]
    for vm in (0, 1):
        for role in ("vcpu", "producer", "consumer"):
            assert sum(name.startswith(f"vm-{vm}.{role}-") for name in names) == 2


@pytest.mark.shows("I11")
def test_a_vm_that_reaches_anothers_frame_is_found_out_and_ends_alone() -> None:
    host = build_host(vcpus=1, cpus=1, vms=2, slice=500)
    victim, culprit = host.machines
    of_victim = victim.memory.frame_view[victim.guest.n_frames - 1]
    program_pages = range(culprit.kernel.layout.first_user_gfn, culprit.guest.n_frames)
    culprit.memory.frame_map[program_pages] = of_victim
    anyio.run(host.run)
    assert culprit.ended.startswith("isolation: frame ")
    assert culprit.ended.endswith("belongs to VM 0")
    assert host.trespasses
    assert victim.ended == "finished"


def test_the_same_seed_gives_the_same_events_and_another_gives_others() -> None:
    shape = SHAPES["three VMs on two CPUs"]
    one, two, other = (run(SMALL_STRESS, "patch", seed, **shape) for seed in (3, 3, 4))
    assert one.summary == two.summary
    columns, again = one.events.columns(), two.events.columns()
    assert all((columns[name] == again[name]).all() for name in columns)
    assert other.summary != one.summary


@pytest.mark.parametrize(
    ("field", "value"), [("cpus", 17), ("cpus", -1), ("vms", 0), ("vms", 17), ("slice", 0)]
)
def test_what_cannot_be_built_is_refused_by_name(field: str, value: int) -> None:
    config: dict[str, Any] = {field: value}
    problem = MachineConfig(**config).problem()
    assert problem is not None
    assert problem.startswith(f"machine.{field} is {value}: must be ")
