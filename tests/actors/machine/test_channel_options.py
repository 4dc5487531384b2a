"""Every option of the patch channels on whole machines: costs change, results do not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from machines import SMALL_CHURN, SMALL_STORM, SMALL_STRESS, WORKLOADS, run_machine, scheme_with

from penumbra.actors.vmm.schemes import Scheme

KINDS = ("pair", "pair-locked", "shared", "per-producer", "per-consumer")
PRESETS = ("patch-locked", "patch-shared")


def memory_of(summary: dict[str, Any]) -> list[tuple[int, str, int, str]]:
    return [(p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]]


def run_right(workload: Any, scheme: Scheme | str, **config: Any) -> dict[str, Any]:
    """Run; assert that the run is coherent and ended well; return its summary."""
    _, summary, verdict = run_machine(workload, scheme, **config)
    assert verdict is not None
    assert verdict.coherent, verdict
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    return summary


@pytest.mark.shows("P8", "S2", "S3", "A40 ¶58", "A40 ¶127")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("vcpus", [1, 4])
def test_a_preset_with_locks_leaves_the_memory_of_native(
    preset: str, name: str, vcpus: int
) -> None:
    native = run_right(WORKLOADS[name], "native", vcpus=vcpus)
    summary = run_right(WORKLOADS[name], preset, vcpus=vcpus)
    assert memory_of(summary) == memory_of(native)
    assert summary["progress"] == native["progress"]
    assert summary["counters"]["patch_lock"] >= summary["counters"]["patch_posted"]


@pytest.mark.shows("P8", "P10")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("capacity", "vcpus"), [(1, 8), (3, 2), (1024, 4)])
def test_every_kind_of_channel_is_right_at_every_capacity(
    kind: str, capacity: int, vcpus: int
) -> None:
    scheme = scheme_with("patch", channels=kind, capacity=capacity)
    # Siblings on one address space may see a change sooner or later: what they leave may differ.
    run_right(SMALL_STRESS, scheme, vcpus=vcpus, tlb_entries=16, tlb_ways=4)
    native = run_right(SMALL_CHURN, "native", vcpus=vcpus)
    summary = run_right(SMALL_CHURN, scheme, vcpus=vcpus, tlb_entries=16, tlb_ways=4)
    assert memory_of(summary) == memory_of(native)


@pytest.mark.shows("P10", "A40 ¶128")
@pytest.mark.parametrize("overflow", ["shootdown", "lost", "wait"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_one_slot_every_overflow_policy_is_right_in_every_kind(
    overflow: str, kind: str
) -> None:
    for workload in (SMALL_STRESS, SMALL_STORM):
        scheme = scheme_with("patch", capacity=1, overflow=overflow, channels=kind)
        summary = run_right(workload, scheme, vcpus=4)
        counters = summary["counters"]
        assert counters["overflow"] > 0
        assert (counters.get("shootdown", 0) > 0) == (overflow == "shootdown")
        assert (counters.get("overflow_wait", 0) > 0) == (overflow == "wait")


@pytest.mark.shows(
    "P1", "P3", "P4", "P8", "A40 ¶99", "A40 ¶101", "A40 ¶108", "A40 ¶117", "A40 ¶128"
)
@pytest.mark.parametrize(
    "options",
    [
        {"in_use": "base"},
        {"in_use": "outside"},
        {"derived": False},
        {"coalesce": "void"},
        {"coalesce": "never"},
        {"stale": "invalidate"},
        {"stale": "invalidate", "derived": False},
        {"postpone": "store"},
        {"postpone": "never"},
        {"tell_all": True},
        {"channels": "shared", "postpone": "store", "coalesce": "void"},
        {"channels": "per-producer", "tell_all": True, "derived": False},
        {"channels": "per-consumer", "postpone": "never", "coalesce": "never"},
        {"channels": "pair-locked", "order": "free_last"},
    ],
    ids=str,
)
def test_an_option_of_the_channels_changes_costs_and_not_results(options: dict[str, Any]) -> None:
    base = run_right(SMALL_STRESS, "patch")
    summary = run_right(SMALL_STRESS, scheme_with("patch", **options))
    assert memory_of(summary) == memory_of(base)
    assert summary["progress"] == base["progress"]


@pytest.mark.shows("P3", "P4")
def test_the_options_are_seen_in_the_counters() -> None:
    def statistics(**options: Any) -> tuple[dict[str, int], dict[str, int]]:
        summary = run_right(SMALL_STORM, scheme_with("patch", **options))
        channels = [channel for row in summary["matrix"] for channel in row]
        sums = {key: sum(channel[key] for channel in channels) for key in channels[0]}
        return summary["counters"], sums

    base, channels = statistics()
    assert "patch_lock" not in base
    assert channels["n_stored"] == 0
    assert statistics(postpone="store")[1]["n_stored"] > 0
    assert statistics(postpone="never")[1]["n_in_channel"] <= channels["n_in_channel"]
    assert statistics(coalesce="never")[1]["n_coalesced"] == 0
    assert statistics(tell_all=True)[1]["n_posted"] > channels["n_posted"]
    assert statistics(channels="shared")[0]["patch_lock"] > 0


@pytest.mark.shows("V4", "A40c 62", "A40c 68", "A40c 74")
@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("preset", ["patch", "patch-shared", "shootdown"])
def test_one_shadow_for_all_cpus_leaves_the_memory_of_native(preset: str, vcpus: int) -> None:
    one = msgspec.structs.replace(scheme_with(preset), shadow="shared")
    native = run_right(SMALL_CHURN, "native", vcpus=vcpus)
    shared = run_right(SMALL_CHURN, one, vcpus=vcpus)
    assert memory_of(shared) == memory_of(native)
    threads = [run_right(SMALL_STRESS, scheme, vcpus=vcpus) for scheme in (one, preset)]
    faults = [summary["counters"]["hidden_fault"] for summary in threads]
    assert faults[0] < faults[1] if vcpus > 1 else faults[0] == faults[1]
