"""The workloads of published measurements, small, under every preset: right, coherent, the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from machines import FAMILIES, run_machine

from penumbra.guest.workloads.workload import named_workload

SMALL: dict[str, dict[str, int]] = {
    "compile-mix": {"units": 2, "pages": 6, "passes": 1},
    "fork-wait": {"rounds": 2, "pages": 4},
    "mmap-server": {"workers": 2, "requests": 3},
    "munmap-storm": {"threads": 1, "rounds": 4},
    "page-fault": {"rounds": 2, "pages": 6},
    "pte-change": {"rounds": 2, "pages": 4},
    "system-calls": {"calls": 20},
}


@cache
def _run(name: str, scheme: str, **config: Any) -> dict[str, Any]:
    workload = named_workload(name, **SMALL[name])
    _, summary, verdict = run_machine(workload, scheme, vcpus=2, quantum=200, **config)
    assert verdict is not None
    assert verdict.coherent
    assert summary["ended"] == "finished"
    assert not [mark for mark in summary["marks"] if mark[0] == "wrong"]
    return summary


@pytest.mark.shows("C5", "S3", "S2")
@pytest.mark.parametrize("scheme", FAMILIES[1:])
@pytest.mark.parametrize("name", SMALL)
def test_a_scheme_leaves_the_memory_that_bare_hardware_leaves(name: str, scheme: str) -> None:
    native, derived = _run(name, "native"), _run(name, scheme)
    assert derived["processes"] == native["processes"]
    assert all(process["ended"] == "exit 0" for process in native["processes"])
    assert sum(process["pages"] for process in native["processes"]) > 0


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_gives_the_same_run(name: str) -> None:
    again = _run.__wrapped__(name, "patch")
    assert again == _run(name, "patch")


def test_a_storm_that_flushes_lazily_interrupts_less_and_leaves_the_same() -> None:
    eager, lazy = (_run("munmap-storm", "native", guest_flush=way) for way in ("eager", "lazy"))
    assert lazy["counters"].get("ipi", 0) < eager["counters"]["ipi"]
    assert [one["pages"] for one in lazy["processes"]] == [
        one["pages"] for one in eager["processes"]
    ]
