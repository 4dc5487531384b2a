"""Every preset runs every workload there is."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from machines import FAMILIES, WORKLOADS, run_machine

from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads import WORKLOADS as NAMED
from penumbra.guest.workloads.workload import named_workload
from tests.actors.machine.test_published_workloads import SMALL

LEAN = {
    **{name: {} for name in WORKLOADS},
    **SMALL,
    "page-splitting": {"rounds": 1, "mib": 2},
    "swap-thrash": {"processes": 1, "threads": 1, "pages": 12, "rounds": 1},
}
# The rest is run by `FAMILIES` in the tests of paging, of recordings, of published workloads.
OTHERS = [name for name in PRESETS if name not in FAMILIES]


@cache
def left_by(name: str, scheme: str) -> tuple[int, list[Any]]:
    """Return the progress and the processes' ends of a coherent run."""
    workload = WORKLOADS.get(name) or named_workload(name, **LEAN[name])
    config: dict[str, Any] = {"disk_mib": 4, "user_frames": 24} if name == "swap-thrash" else {}
    _, summary, verdict = run_machine(workload, scheme, vcpus=2, check=True, **config)
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    return summary["progress"], summary["processes"]


@pytest.mark.shows("S2", "S3")
@pytest.mark.parametrize("scheme", OTHERS)
@pytest.mark.parametrize("workload", LEAN)
def test_a_preset_leaves_what_bare_hardware_leaves(workload: str, scheme: str) -> None:
    progress, left = left_by(workload, scheme)
    native, native_left = left_by(workload, "native")
    assert left == native_left
    # Under native-patch the guest itself flushes in another way.
    assert progress == native or scheme == "native-patch"


@pytest.mark.shows("S2", "S3", "G7")
@pytest.mark.parametrize("scheme", FAMILIES[1:])
def test_large_pages_are_right_under_every_way_to_follow_them(scheme: str) -> None:
    assert left_by("page-splitting", scheme) == left_by("page-splitting", "native")


@pytest.mark.shows("S2")
def test_no_workload_is_left_out() -> None:
    assert set(LEAN) == set(NAMED)
