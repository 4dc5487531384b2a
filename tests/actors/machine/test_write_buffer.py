"""Whole machines under `write-buffer`: coherent, and with the memory of `native`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import pytest
from buffers import buffer_scheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import SMALL_STRESS, WORKLOADS, run_machine

import penumbra.guest
from penumbra.actors.vmm.schemes import WRITE_BUFFER, Scheme
from penumbra.guest.workloads.workload import Workload, named_workload, recorded_workload

from .test_dma import run_turner

RECORDINGS = Path(next(iter(penumbra.guest.__path__))) / "recordings"
THRASH = named_workload("swap-thrash", processes=2, threads=2, pages=16, rounds=1)
PAGED: dict[str, Any] = {
    "user_frames": 16, "disk_mib": 1, "disk_latency": 700, "timer_period": 3000,
}  # fmt: skip


def left_by(summary: dict[str, Any]) -> list[tuple[int, str, int, str]]:
    return [(p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]]


def run_right(workload: Workload, scheme: Scheme | str, **config: Any) -> dict[str, Any]:
    """Run to the end; assert that the guest was right and every access allowed."""
    machine, summary, verdict = run_machine(workload, scheme, **config)
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    if not workload.streams:  # recorded programs end as they did
        assert {p["ended"] for p in summary["processes"]} == {"exit 0"}
    for cpu in machine.cpus:
        cpu.write_buffer.check()
    return summary


@pytest.mark.shows("H10", "W1", "W2", "S2", "C5")
@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_leaves_the_memory_of_native_without_an_exit_per_store(
    name: str, paging: str
) -> None:
    native = run_right(WORKLOADS[name], "native", paging=paging)
    logged = run_right(WORKLOADS[name], "write-buffer", paging=paging)
    traced = run_right(WORKLOADS[name], "patch", paging=paging)
    assert left_by(logged) == left_by(native)
    assert logged["progress"] == native["progress"]
    assert traced["exits"]["traced store"] > 0
    assert "traced store" not in logged["exits"]
    assert logged["counters"]["log_record"] > 0


machines = st.fixed_dictionaries(
    {
        "vcpus": st.integers(1, 16),
        "smt": st.sampled_from([1, 2]),
        "tlb": st.sampled_from([(8, 4), (64, 4), (1536, 12)]),
        "psc_slots": st.sampled_from([0, 4, 16]),
        "paging": st.sampled_from(["ia32", "x86-64"]),
        "quantum": st.sampled_from([50, 1000, 20_000]),
        "guest_flush": st.sampled_from(["eager", "batched", "lazy", "quiesce"]),
    }
)
buffers = st.fixed_dictionaries(
    {
        "records": st.sampled_from([1, 2, 7, 64, 1024]),
        "overflow": st.sampled_from(["exit", "lost"]),
        "marks": st.sampled_from(["tables", "writable"]),
        "combines": st.booleans(),
        "capacity": st.sampled_from([1, 4, 1024]),
        "flood": st.sampled_from([0, 3]),
    }
)


@pytest.mark.shows("H10", "W2", "W4", "W5", "W6", "EG1", "C1")
@pytest.mark.parametrize("name", [*WORKLOADS, "swap"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=machines, options=buffers, seed=st.integers(0, 3))
def test_machines_and_buffers_of_all_sizes_are_coherent_and_right(
    name: str, config: dict[str, Any], options: dict[str, Any], seed: int
) -> None:
    entries, ways = config.pop("tlb")
    workload = WORKLOADS.get(name, THRASH)
    more = PAGED if name == "swap" else {}
    same = {**config, **more, "tlb_entries": entries, "tlb_ways": ways, "seed": seed}
    summary = run_right(workload, buffer_scheme(**options), **same)
    # What a fork of the stress test catches of its siblings' pages is a race of the guest's own.
    if config["guest_flush"] in ("eager", "quiesce") and name != SMALL_STRESS.name:
        native = run_right(workload, "native", **same)
        assert left_by(summary) == left_by(native)


@pytest.mark.shows("S1", "W2")
def test_write_buffers_go_with_immediate_shootdown_as_well() -> None:
    scheme = msgspec.structs.replace(WRITE_BUFFER, propagate="shootdown", apply="invalidate")
    summary = run_right(SMALL_STRESS, scheme)
    assert summary["counters"]["shootdown"] > 0
    assert left_by(summary) == left_by(run_right(SMALL_STRESS, "native"))


@pytest.mark.shows("H10", "K5")
def test_the_same_seed_gives_the_same_events_with_and_without_the_checker() -> None:
    scheme = buffer_scheme(records=4)
    runs = [
        run_machine(SMALL_STRESS, scheme),
        run_machine(SMALL_STRESS, scheme, loop="asyncio"),
        run_machine(SMALL_STRESS, scheme, check=False),
    ]
    assert [summary for _, summary, _ in runs[1:]] == [runs[0][1]] * 2
    columns = [machine.observer.events.columns() for machine, _, _ in runs]
    for other in columns[1:]:
        assert {name: column.tolist() for name, column in other.items()} == {
            name: column.tolist() for name, column in columns[0].items()
        }


@pytest.mark.shows("H10", "C1")
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="millions of references")
@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.trace")), ids=lambda path: path.stem)
def test_the_shipped_recordings_replay_coherent_with_the_memory_of_native(path: Path) -> None:
    workload = recorded_workload(path)
    paging = "ia32" if workload.bits == 32 else "x86-64"
    native = run_right(workload, "native", paging=paging, vcpus=4)
    logged = run_right(workload, "write-buffer", paging=paging, vcpus=4)
    assert left_by(logged) == left_by(native)
    assert logged["progress"] == native["progress"]


@pytest.mark.shows("W6", "EG7", "H8")
@pytest.mark.parametrize("paging", ["ia32", "x86-64"])
@pytest.mark.parametrize("records", [1, 64])
def test_dma_into_a_live_table_passes_no_buffer_and_is_told(paging: str, records: int) -> None:
    for vcpus in (1, 2, 4):
        _, summary, verdict = run_turner(
            buffer_scheme(records=records), vcpus=vcpus, paging=paging, tlb_entries=16, tlb_ways=4
        )
        assert (summary["ended"], summary["marks"]) == ("finished", [])
        assert verdict.coherent, verdict.explain()


@pytest.mark.shows("EG7", "C2")
def test_dma_that_is_told_to_nobody_leaves_translations_stale() -> None:
    _, summary, verdict = run_turner(buffer_scheme(fault="dma_untold"), vcpus=2)
    assert not verdict.coherent
    assert summary["marks"]  # the guest, too, reads what it must not


@pytest.mark.shows("EG1", "C2")
def test_records_that_are_dropped_and_not_made_good_are_found_by_the_checker() -> None:
    scheme = buffer_scheme(fault="loss_ignored", records=2)
    _, _, verdict = run_machine(SMALL_STRESS, scheme, invariants=False)
    assert verdict is not None
    assert not verdict.coherent
