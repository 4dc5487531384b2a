"""Ways to get control of privileged instructions: own cost, same results. Source: A40 ¶50, ¶114."""

from __future__ import annotations

from typing import Any

import pytest
from machines import SMALL_CHURN, SMALL_STORM, run_machine

from penumbra.actors.machine.control import CONTROLS, ControlName
from penumbra.guest.workloads.workload import Workload

pytestmark = pytest.mark.shows("V8")

_COUNTED = {"exit", "callout", "translated"}


def run(workload: Workload, control: ControlName, scheme: str = "patch") -> dict[str, Any]:
    _, summary, verdict = run_machine(workload, scheme, vcpus=2, control=control)
    assert verdict is not None
    assert verdict.coherent
    return summary


@pytest.mark.parametrize("scheme", ["shootdown", "patch"])
@pytest.mark.parametrize("workload", [SMALL_CHURN, SMALL_STORM], ids=lambda w: w.name)
def test_the_guest_does_the_same_under_each(workload: Workload, scheme: str) -> None:
    runs = [run(workload, control, scheme) for control in CONTROLS]
    for summary in runs[1:]:
        for part in ("ended", "progress", "processes", "matrix"):
            assert summary[part] == runs[0][part]
        same = [
            {name: n for name, n in one["counters"].items() if name not in _COUNTED}
            for one in (summary, runs[0])
        ]
        assert same[0] == same[1]
    assert len({summary["cost"] for summary in runs}) == len(runs)


@pytest.mark.shows("A40 ¶114")
def test_without_privilege_every_privileged_instruction_and_every_system_call_traps() -> None:
    assisted, deprivileged = run(SMALL_STORM, "assisted"), run(SMALL_STORM, "deprivileged")
    more = {
        reason: n
        for reason, n in deprivileged["exits"].items()
        if n != assisted["exits"].get(reason, 0)
    }
    assert set(more) == {"interrupt flag", "return", "syscall"}
    assert more["syscall"] == deprivileged["counters"]["syscall"]
    entries = ("syscall", "guest_fault", "interrupt")
    assert more["return"] <= sum(deprivileged["counters"][name] for name in entries)


@pytest.mark.shows("A40 ¶114")
def test_translated_code_calls_out_instead_of_trapping() -> None:
    deprivileged, translated = run(SMALL_STORM, "deprivileged"), run(SMALL_STORM, "translated")
    trapped = set(deprivileged["exits"]) - set(translated["exits"])
    privileged = {"invlpg", "cr3_load", "timer", "ipi", "hlt", "interrupt flag", "return"}
    assert trapped == {*privileged, "traced store"} & set(deprivileged["exits"])
    assert "traced store" in trapped
    assert translated["counters"]["callout"] == sum(deprivileged["exits"][why] for why in trapped)
    assert 0 < translated["counters"]["translated"] < translated["progress"]


def test_bare_hardware_traps_nothing() -> None:
    summary = run(SMALL_CHURN, "deprivileged", "native")
    assert summary["exits"] == {}
    assert "callout" not in summary["counters"]
