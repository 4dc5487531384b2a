"""Every preset runs every workload there is: here, or in the tests that this file names."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from machines import WORKLOADS, run_machine

from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads import WORKLOADS as NAMED
from penumbra.guest.workloads.workload import named_workload
from tests.actors.machine.test_published_workloads import SMALL

# Workload -> the test that runs it under every preset.
ELSEWHERE = {
    **dict.fromkeys(WORKLOADS, "test_run.py"),
    **dict.fromkeys(SMALL, "test_published_workloads.py"),
    "swap-thrash": "test_paging.py",
}
HERE = {"page-splitting": {"rounds": 1, "mib": 2}}


@cache
def left_by(workload: str, scheme: str) -> tuple[int, list[Any]]:
    """Return the progress and the processes' ends of a coherent run."""
    _, summary, verdict = run_machine(
        named_workload(workload, **HERE[workload]), scheme, vcpus=2, check=True
    )
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    return summary["progress"], summary["processes"]


@pytest.mark.shows("S2", "S3", "G7")
@pytest.mark.parametrize("scheme", [name for name in PRESETS if name != "native"])
@pytest.mark.parametrize("workload", HERE)
def test_a_preset_leaves_what_bare_hardware_leaves(workload: str, scheme: str) -> None:
    assert left_by(workload, scheme) == left_by(workload, "native")


@pytest.mark.shows("S2")
def test_no_workload_is_left_out() -> None:
    assert {*ELSEWHERE, *HERE} == set(NAMED)
