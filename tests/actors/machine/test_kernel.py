"""The kernel: action queues, routes of interrupts, console, applications, hosted form.

Source: A40 ¶44-56.
"""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from machines import SMALL_STORM, SMALL_STRESS

from penumbra.actors.machine.actions import ActionQueue, RaiseInterrupt
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.console import ApplicationActor, ConsoleActor, Keys, Left, Rpc, Work
from penumbra.actors.machine.host import Host
from penumbra.actors.machine.routes import Route, Vector, route
from penumbra.actors.machine.run import simulate
from penumbra.actors.machine.several import build_rig
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.workload import Workload, named_workload
from penumbra.hw.costs import CostProfile
from penumbra.hw.interrupts import NEVER

SWAPPING = named_workload("swap-thrash", processes=2, threads=1, pages=20, rounds=1)
SHARED: dict[str, Any] = {"vcpus": 2, "cpus": 1, "slice": 2000, "quantum": 500}


def run(workload: Workload, scheme: str = "patch", **config: Any) -> dict[str, Any]:
    result = simulate(
        machine=MachineConfig(**config), scheme=PRESETS[scheme], workload=workload,
        costs=CostProfile(), seed=1,
    )  # fmt: skip
    assert result.verdict is not None
    assert result.verdict.coherent
    assert result.summary["ended"] == "finished"
    return result.summary


def build_host(**config: Any) -> Host:
    rig = build_rig(
        MachineConfig(**config), PRESETS["patch"], SMALL_STRESS, CostProfile(), 1, check=False
    )
    host = getattr(rig.run, "__self__", None)
    assert isinstance(host, Host)
    return host


@pytest.mark.shows("V7")
def test_actions_are_taken_in_order_when_they_are_due() -> None:
    queue = ActionQueue()
    assert queue.next_due == NEVER
    for due, vector in ((30, 1), (10, 2), (10, 3), (40, 4)):
        queue.post(RaiseInterrupt(due, vector))
    assert queue.next_due == 10
    assert [action.vector for action in queue.take(9)] == []
    assert [action.vector for action in queue.take(30)] == [2, 3, 1]
    assert queue.next_due == 40
    assert [action.vector for action in queue.take(40)] == [4]
    assert queue.next_due == NEVER


@pytest.mark.shows("V7")
def test_the_queue_is_looked_at_after_kernel_calls_and_before_resumes() -> None:
    counters = run(SWAPPING, **SHARED, disk_mib=4, user_frames=24, disk_latency=1)["counters"]
    assert counters["actions_kernel_call"] > 0
    assert counters["actions_resume"] > 0
    assert counters["actions_kernel_call"] + counters["actions_resume"] >= counters["dma"]


@pytest.mark.shows("V7")
def test_a_running_vcpu_is_stopped_within_one_ipi_latency() -> None:
    host = build_host(vcpus=2, vms=2, cpus=4, quantum=50_000, ipi_latency=300)
    machine = host.machines[0]
    late: list[int] = []
    for queue in machine.actions:
        take = queue.take

        def noted(progress: int, take: Any = take) -> list[RaiseInterrupt]:
            taken: list[RaiseInterrupt] = take(progress)
            late.extend(progress - action.due for action in taken)
            return taken

        queue.take = noted  # type: ignore[method-assign]
    anyio.run(host.run)
    assert late, "the workload sends IPIs"
    assert machine.observer.totals()["check_action_ipi"] > 0
    # One operation or one recorded run is indivisible; the quantum of 50,000 is not waited for.
    assert max(late) <= 300


@pytest.mark.shows("V9")
@pytest.mark.parametrize(
    ("kind", "vector", "way"),
    [
        ("vm", Vector.CHECK_ACTION, Route.MONITOR),
        ("vm", Vector.PAGE_FAULT, Route.MONITOR),
        ("vm", Vector.TIMER, Route.KERNEL),
        ("vm", Vector.KEYBOARD, Route.CONSOLE),
        ("vm", Vector.DISK, Route.GUEST),
        ("application", Vector.PAGE_FAULT, Route.KERNEL),
        ("console", Vector.PAGE_FAULT, Route.CONSOLE),
        (None, Vector.CHECK_ACTION, Route.KERNEL),
    ],
)
def test_the_world_that_is_interrupted_decides_the_route(
    kind: str | None, vector: Vector, way: Route
) -> None:
    assert route(kind, vector) is way


@pytest.mark.shows("V9")
def test_each_route_is_taken_in_a_run() -> None:
    summary = run(SWAPPING, **SHARED, disk_mib=4, user_frames=24, applications=1)
    taken = {(vector, way) for _, vector, way, n in summary["interrupts"] if n}
    assert ("timer", "kernel") in taken
    assert ("disk", "kernel to guest") in taken
    busy = run(SMALL_STRESS, vcpus=2, vms=2, cpus=4)
    taken |= {(vector, way) for _, vector, way, n in busy["interrupts"] if n}
    assert ("check-action IPI", "monitor alone") in taken


@pytest.mark.shows("V9", "V10")
def test_what_is_typed_reaches_the_console_and_no_guest() -> None:
    host = build_host(**SHARED)
    plain = build_host(**SHARED)

    async def main() -> None:
        typed = iter(["ls", "uptime"])
        grant = host.machines[0].grant

        def noted(vcpu_id: int) -> None:
            grant(vcpu_id)
            text = next(typed, None)
            if text is not None:
                host.kernel.typed(text)

        host.machines[0].grant = noted  # type: ignore[method-assign]
        await host.run()
        await plain.run()

    anyio.run(main)
    assert [line for line in host.kernel.said if line.startswith("> ")] == ["> ls", "> uptime"]
    ways = {way for (_, vector, way) in host.kernel.routes if vector is Vector.KEYBOARD}
    assert ways == {Route.CONSOLE}
    records = [m.ledger.records for m in (host.machines[0], plain.machines[0])]
    assert {r.ended for r in records[0].values()} == {r.ended for r in records[1].values()}


@pytest.mark.shows("V10")
def test_the_console_serves_calls_when_its_world_runs_and_the_caller_does_not_wait() -> None:
    console = ConsoleActor()
    assert console.receive(Rpc(0, "a")) == Left(0, 1)
    assert console.receive(Keys("b")) == Left(0, 2)
    assert console.receive(Work(200)) == Left(200, 1, ("VM 0: a",))
    assert console.receive(Work(10_000)) == Left(200, 0, ("> b",))


@pytest.mark.shows("V10", "A40 Fig 5")
def test_monitors_report_their_guests_ends_to_the_console() -> None:
    summary = run(SMALL_STRESS, **SHARED, vms=2)
    ends = [record["ended"] for record in summary["processes"]]
    assert len(summary["console"]) == len(ends)
    assert {line.partition(":")[0] for line in summary["console"]} == {"VM 0", "VM 1"}


@pytest.mark.shows("V10")
def test_applications_are_worlds_that_take_time_and_change_no_guest() -> None:
    alone, busy = run(SMALL_STRESS, **SHARED), run(SMALL_STRESS, **SHARED, applications=2)
    assert "application" in {kind for kind, _, _, _ in busy["interrupts"]}
    assert "application" not in {kind for kind, _, _, _ in alone["interrupts"]}
    assert len(busy["processes"]) == len(alone["processes"])
    application = ApplicationActor(500)
    assert application.receive(Work(300)) == Left(300, 200)
    assert application.receive(Work(300)) == Left(200, 0)


@pytest.mark.shows("V10", "S3")
def test_the_hosted_form_does_the_same_and_pays_world_switches_for_device_calls() -> None:
    config = SHARED | {"cpus": 2, "disk_mib": 4, "user_frames": 24, "vms": 1}
    runs = {
        (scheme, form): run(SWAPPING, scheme, **config, form=form, applications=1)
        for scheme in ("native", "patch")
        for form in ("kernel", "hosted")
    }
    assert len({(one["progress"], str(one["console"])) for one in runs.values()}) == 1
    kernel, hosted = runs["patch", "kernel"]["counters"], runs["patch", "hosted"]["counters"]
    assert kernel["kernel_call"] == hosted["kernel_call"] > 0
    more = hosted["world_switch"] - kernel["world_switch"]
    assert more == 2 * hosted["kernel_call"]
    assert runs["patch", "hosted"]["cost"] > runs["patch", "kernel"]["cost"]
    assert "kernel_call" not in runs["native", "hosted"]["counters"]


@pytest.mark.shows("V7", "G2")
def test_a_guest_paged_to_disk_under_a_kernel_does_what_it_does_alone() -> None:
    alone = run(SMALL_STORM, vcpus=2)
    shared = run(SMALL_STORM, vcpus=2, applications=1, cpus=2)
    assert [r["digest"] for r in alone["processes"]] == [r["digest"] for r in shared["processes"]]
