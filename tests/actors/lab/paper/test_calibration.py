"""The shipped profiles are what the published nanobenchmarks give; nothing else is called so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import run_machine

import penumbra.hw
from penumbra.actors.lab.paper.calibration import (
    HARDWARE,
    NATIVE,
    PUBLISHED,
    TRANSLATED,
    CalibrationError,
    Equation,
    calibrate,
    equations,
    profile_text,
    solve,
)
from penumbra.guest.workloads.workload import named_workload
from penumbra.hw.costs import CostProfile, prices, shipped_profiles

pytestmark = pytest.mark.shows("H11")

# The table of the published cycles, typed in again: divzero, pgfault, ptemod.
CYCLES = {NATIVE: (889, 1093, None), TRANSLATED: (3223, 3927, 391), HARDWARE: (1014, 11242, 12733)}


def test_each_shipped_profile_is_the_one_that_the_published_cycles_give() -> None:
    derived = calibrate()
    assert set(derived) == set(shipped_profiles()) == set(CYCLES)
    for name, (profile, _) in derived.items():
        assert shipped_profiles()[name] == profile


@pytest.mark.parametrize("name", [NATIVE, TRANSLATED, HARDWARE])
def test_each_shipped_file_is_the_text_that_calibration_writes(name: str) -> None:
    [folder] = penumbra.hw.__path__
    text = (Path(folder) / "cost_profiles" / f"{name}.toml").read_text(encoding="utf-8")
    assert text == profile_text(name)


@pytest.mark.parametrize("name", [NATIVE, TRANSLATED, HARDWARE])
def test_a_profile_gives_back_every_nanobenchmark_it_was_made_from(name: str) -> None:
    profile = shipped_profiles()[name]
    published = [cycles for cycles in CYCLES[name] if cycles is not None]
    assert [profile.cost(row.counters) for row in equations(name)] == published
    names = ("divzero", "pgfault", "ptemod")
    assert [PUBLISHED[which][name] for which in names if name in PUBLISHED[which]] == published


def test_the_prices_follow_by_hand() -> None:
    native, bt, hw = (shipped_profiles()[name] for name in (NATIVE, TRANSLATED, HARDWARE))
    assert native.walk_read == (1093 - 889) // 4 == bt.walk_read == hw.walk_read
    assert hw.exit == 11242 - 1014 - (1093 - 889)
    assert hw.emulated_store == 12733 - hw.exit - hw.invlpg
    assert bt.exit == 3927 - 3223 - (1093 - 889)
    assert bt.emulated_store == 391 - bt.callout - bt.invlpg


def test_only_what_an_equation_has_set_is_called_calibrated() -> None:
    expected = {
        NATIVE: ("guest_fault", "walk_read"),
        TRANSLATED: ("emulated_store", "exit", "guest_fault", "walk_read"),
        HARDWARE: ("emulated_store", "exit", "guest_fault", "walk_read"),
    }
    default = prices(CostProfile())
    for name, (profile, calibrated) in calibrate().items():
        assert calibrated == expected[name]
        marked = [line for line in profile_text(name).splitlines() if line.endswith("# calibrated")]
        assert sorted(line.split()[0] for line in marked) == list(calibrated)
        assert "R1-R3" in profile.source
        # No price of an interrupt between processors or of a patch is in R1-R3.
        for price in ("ipi", "patch_posted", "patch_applied", "cr3_load", "progress"):
            assert prices(profile)[price] == default[price]


def test_elimination_solves_one_unknown_per_equation() -> None:
    rows = [Equation("a", 10, {"x": 2}), Equation("b", 17, {"x": 1, "y": 3, "z": 0})]
    assert solve({"z": 5}, rows) == {"x": 5, "y": 4}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([Equation("a", 10, {"x": 1, "y": 1})], "a: 2 unknown prices"),
        ([Equation("a", 10, {"k": 1})], "a: 0 unknown prices"),
        ([Equation("a", 10, {"x": 3})], "a: x would be"),
        ([Equation("a", 10, {"x": 1, "k": 20})], "a: x would be -10 cycles"),
    ],
)
def test_equations_without_one_whole_solution_are_refused(rows: list[Equation], why: str) -> None:
    with pytest.raises(CalibrationError, match=why):
        solve({"k": 1}, rows)


def _run(control: Any) -> dict[str, Any]:
    workload = named_workload("pte-change", rounds=2, pages=4)
    _, summary, verdict = run_machine(workload, "shootdown", vcpus=1, control=control)
    assert verdict is not None
    assert verdict.coherent
    return summary


def test_the_machine_counts_what_the_nanobenchmarks_are_said_to_be_made_of() -> None:
    """A traced store is one exit (or call-out) and one emulated store, a fault one exit and one
    delivery: the rows of counters that prices are solved from."""
    assisted, translated = _run("assisted"), _run("translated")
    for summary in (assisted, translated):
        assert summary["exits"]["true fault"] == summary["counters"]["guest_fault"] > 0
    assert assisted["exits"]["traced store"] == assisted["counters"]["emulated_store"] > 8
    assert "traced store" not in translated["exits"]
    assert translated["counters"]["emulated_store"] == assisted["counters"]["emulated_store"]
    assert translated["counters"]["callout"] > translated["counters"]["emulated_store"]
