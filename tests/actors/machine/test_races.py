"""Naive orders switched on in whole runs: what one process can show, the checker catches.

Races 2, 3, 4 and 6 need two processors inside one exit: `tests/actors/core/test_races.py` shows
them step by step. Race 5 needs a table in a user's page: `tests/actors/vmm` shows it.
"""

from __future__ import annotations

import pytest
from machines import SMALL_STRESS, run_machine, scheme_with, workload_of
from small_programs import race_one


@pytest.mark.shows("P9", "A40c 49")
def test_race_1_a_stale_derived_value_is_refused_by_the_source_comparison() -> None:
    _, summary, verdict = run_machine(workload_of(race_one()), "patch")
    assert verdict is not None
    assert verdict.coherent, verdict
    ended = summary["processes"][0]["ended"]
    assert ended == "segmentation fault: write to read-only 0x20000000"


@pytest.mark.shows("P9", "A40c 49", "C2")
def test_race_1_without_the_source_comparison_is_caught_by_the_checker() -> None:
    _, summary, verdict = run_machine(
        workload_of(race_one()), scheme_with("patch", order="no_source_compare")
    )
    assert verdict is not None
    assert not verdict.coherent
    violation = verdict.violations[0]
    assert (violation.access, violation.gva) == ("write", 0x2000_0000)
    assert summary["processes"][0]["ended"] == "exit 0"


@pytest.mark.shows("C2")
def test_patches_left_in_a_channel_without_a_mark_are_caught_by_the_checker() -> None:
    _, _, verdict = run_machine(
        SMALL_STRESS, scheme_with("patch", order="left_unmarked"), quantum=500, invariants=False
    )
    assert verdict is not None
    assert not verdict.coherent
