"""The arithmetic of cells, on runs that are made up, and the registry of published rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from penumbra.actors.lab.paper import figures as f
from penumbra.actors.lab.paper import table
from penumbra.actors.lab.paper.rows import PROGRAMS
from penumbra.actors.lab.paper.runs import Measured, Run, same_page_share
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads import WORKLOADS
from penumbra.hw.costs import shipped_profiles

pytestmark = pytest.mark.shows("H11")

A, B, C, D = (Run("fork-wait", "native", vcpus=n) for n in (1, 2, 3, 4))


def made_up(
    *costs: int, ended: str = "finished", coherent: bool | None = True, **counters: int
) -> Measured:
    summary: dict[str, Any] = {
        "ended": ended, "marks": [], "counters": counters, "vcpu": [{"cost": n} for n in costs],
    }  # fmt: skip
    return Measured(summary, coherent)


def figure(formula: f.Formula | None, *runs: Run, **more: Any) -> f.Figure:
    return f.Figure("R5", "one over another", "3 x", "x", "predicted", runs, formula, **more)


def test_time_is_that_of_the_vcpu_that_has_cost_most() -> None:
    assert made_up(10, 70, 30).elapsed == 70
    assert f.ratio([made_up(10, 60), made_up(20, 15)]) == 3
    assert f.change_percent([made_up(5), made_up(20)]) == -75
    assert f.invalidation_share([made_up(50), made_up(30)]) == pytest.approx(40)


def test_a_margin_leaves_out_what_both_runs_of_a_pair_have() -> None:
    runs = [made_up(1000 + 70 * 4), made_up(1000 + 20 * 4), made_up(90 + 70), made_up(90 + 20)]
    assert f.marginal_ratio(50)(runs) == 4
    assert f.marginal_difference(50)(runs) == 3


def test_gaps_are_counted_either_way() -> None:
    runs = [made_up(n) for n in (100, 100, 104, 100, 100, 150, 300, 100)]
    assert f.share_without_gap(runs) == 50
    assert f.largest_gap_percent(runs) == pytest.approx(200)
    assert f.largest_ratio(runs) == 3
    assert f.reads_per_walk([made_up(1, walk_read=60, walk=15)]) == 4
    assert f.reads_per_walk([made_up(1, walk_read=60, second_read=300, walk=15)]) == 24


def test_a_store_hits_when_its_vcpus_last_one_went_to_the_same_page() -> None:
    rows = [
        (3, 0, 0x1000),
        (3, 1, 0x1008),
        (9, 0, 0x7000),
        (4, 0, 0x1FF8),
        (3, 0, 0x2000),
        (3, 1, 0x5000),
    ]
    kind, vcpu, arg0 = (np.array(column) for column in zip(*rows, strict=True))
    columns = {"kind": kind, "vcpu": vcpu, "arg0": arg0}
    assert same_page_share(columns, (3, 4)) == pytest.approx(1 / 5)
    assert math.isnan(same_page_share(columns, (77,)))


def test_a_cell_has_value_unit_tag_and_distance() -> None:
    cell = f.cell_of(figure(f.ratio, A, B, low=4, high=4), PRESETS, {A: made_up(6), B: made_up(3)})
    assert cell == f.Cell("predicted", 2.0, "2.00 x", "0.50 of it")
    inside = figure(f.ratio, A, B, low=1, high=4)
    assert f.cell_of(inside, PRESETS, {A: made_up(6), B: made_up(3)}).off == "within"
    points = f.Figure("R11", "", "", "%", "predicted", (A, B), f.change_percent, -70, -70)
    cell = f.cell_of(points, PRESETS, {A: made_up(6), B: made_up(12)})
    assert (cell.text, cell.off) == ("-50.0 %", "+20 points")


def test_a_scheme_that_is_not_built_leaves_a_cell_that_says_so_and_needs_no_run() -> None:
    other = Run("fork-wait", "no-such-scheme")
    both = figure(f.ratio, A, other)
    assert f.cell_of(both, PRESETS, {}) == f.Cell("none", None, "scheme not built: no-such-scheme")
    assert table.needed([both, figure(f.ratio, A, B), figure(f.ratio, B, A)], PRESETS) == [A, B]
    # Once the preset is there, the same figure has its number.
    cell = f.cell_of(both, [*PRESETS, "no-such-scheme"], {A: made_up(6), other: made_up(2)})
    assert (cell.tag, cell.value) == ("predicted", 3.0)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (made_up(3, ended="max_progress"), "the run ended: max_progress"),
        (made_up(3, coherent=False), "not coherent"),
        (Measured({**made_up(3).summary, "marks": [["wrong", [1], ""]]}), "wrong values"),
        (made_up(0), "nothing to divide by"),
    ],
)
def test_no_number_is_taken_from_a_run_that_is_not_right(bad: Measured, why: str) -> None:
    cell = f.cell_of(figure(f.ratio, A, B), PRESETS, {A: made_up(6), B: bad})
    assert (cell.tag, cell.value) == ("none", None)
    assert why in cell.text


def test_what_is_not_modelled_says_why() -> None:
    assert f.cell_of(figure(None, note="why"), PRESETS, {}).text == "not modelled"
    for one in table.figures():
        assert (one.formula is None) == (one.tag == f.NONE)
        assert one.formula is not None or one.note


def test_every_published_row_is_in_the_table_and_only_r1_to_r3_are_calibrated() -> None:
    rows = [one.row for one in table.figures()]
    assert list(dict.fromkeys(rows)) == [f"R{n}" for n in range(1, 16)] == list(table.SOURCES)
    calibrated = {one.row for one in table.figures() if one.tag == f.CALIBRATED}
    assert calibrated == {"R1", "R2", "R3"}
    assert len({(one.row, one.what) for one in table.figures()}) == len(rows)


def test_every_run_names_what_there_is_or_a_scheme_to_come() -> None:
    to_come = {
        "patch-shared",
        "vtlb",
        "vtlb-eager",
        "write-buffer",
        "out-of-sync",
        "nested",
        "native-patch",
    }
    assert set(PROGRAMS) <= set(WORKLOADS)
    for run in table.needed(table.figures(), {*PRESETS, *to_come}):
        assert run.workload in WORKLOADS
        assert run.profile in shipped_profiles()
        assert run.scheme in {*PRESETS, *to_come}
