"""The table of `just bench`: which rows it has, how ratios come about, what is written down.

Nothing here looks at how fast anything is.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from harness import Kind, Line, Result, Row, Sampler, Summary, Unavailable, measure, pair, sides
from registry import all_lines
from rows_schemes import SCHEMES
from scheme_guest import N_CHANGED, SchemeRun, Size
from table import as_json, chosen, number

from penumbra.actors.vmm.schemes import PRESETS

ROOT = Path(__file__).parents[2]

# What may not grow, per scheme, event and size.
GROWN = [
    f"{scheme}-{event}-{what}"
    for scheme in ("shootdown", "patch", "vtlb", "write-buffer", "out-of-sync", "nested")
    for event, sizes in (
        ("hidden", ("vcpus", "pages")),
        ("store", ("vcpus", "pages")),
        ("event", ("vcpus", "pages")),
        ("switch", ("vcpus",)),
    )
    for what in sizes
] + [
    f"{scheme}-{event}-capacity"
    for scheme in ("patch", "write-buffer")
    for event in ("store", "event")
] + [
    "shootdown-store-told",
    "patch-store-told",
    "write-buffer-event-told",
    "out-of-sync-store-told",
]  # fmt: skip

# The reach table, row by row: what is reached, and whether it is at least or at most that.
REACHES = {
    "messages/tell-trio": (Kind.SPEED, 9.0),
    "messages/tell-asyncio": (Kind.SPEED, 10.0),
    "messages/tell-uvloop-queue": (Kind.SPEED, 1.0),
    "messages/ask-idle": (Kind.TIME, 0.08),
    "messages/ask-timed": (Kind.TIME, 1.8),
    "patches/post": (Kind.SPEED, 9.0),
    "patches/batch": (Kind.SPEED, 50.0),
    "patches/grown-post-vcpus": (Kind.TIME, 1.3),
    "patches/grown-post-told": (Kind.TIME, 1.3),
    "patches/grown-post-capacity": (Kind.TIME, 1.3),
    "patches/grown-event-vcpus": (Kind.TIME, 1.3),
    "patches/grown-event-capacity": (Kind.TIME, 1.3),
    "processes/ring": (Kind.SPEED, 15.0),
    "processes/tell": (Kind.SPEED, 8.0),
    "processes/tell-thespian": (Kind.SPEED, 80.0),
    "engine/counted-worst": (Kind.SPEED, 0.65),
    "engine/counted-median": (Kind.SPEED, 0.75),
    "engine/checked-worst": (Kind.SPEED, 0.5),
    "engine/cachesim-worst": (Kind.SPEED, 1.1),
    "engine/plain-worst": (Kind.SPEED, 25.0),
    "engine/coded": (Kind.SPEED, 1.5),
    "exits/hidden-fault": (Kind.TIME, 2.0),
    "exits/traced-store": (Kind.TIME, 2.0),
    "exits/event-16": (Kind.TIME, 3.0),
    "exits/guest-fault": (Kind.TIME, 12.0),
    "runs/unaccounted": (Kind.TIME, 0.15),
    "schemes/switcher-faults": (Kind.TIME, 0.1),
    **{f"schemes/grown-{name}": (Kind.TIME, 1.3) for name in GROWN},
    "start/help": (Kind.TIME, 5.0),
    "start/first-reference": (Kind.TIME, 2.0),
}


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmarks as the recipe does."""
    return subprocess.run(
        [sys.executable, "-P", "benchmarks", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def fixed(yardstick: float, row: float) -> Row:
    return Row("g/fixed", "", Kind.SPEED, 2.0, sides(lambda: yardstick, lambda: row))


def quiet(_: str) -> None:
    """Hear nothing of the progress."""


def test_every_row_of_the_reach_table_is_there_with_its_reach() -> None:
    judged = {line.name: (line.kind, line.reach) for line in all_lines() if line.reach is not None}
    assert judged == REACHES


def test_names_are_unique_and_summaries_stand_in_the_group_of_their_rows() -> None:
    lines = all_lines()
    names = [line.name for line in lines]
    assert len(set(names)) == len(names)
    for line in lines:
        if isinstance(line, Summary):
            assert set(line.of) <= set(names)
            assert {name.split("/")[0] for name in (line.name, *line.of)} == {
                line.name.split("/")[0]
            }


def test_a_pattern_for_a_summary_brings_its_rows_along() -> None:
    found = {line.name for line in chosen(all_lines(), ["engine/plain-w*", "start/*"])}
    assert "engine/plain-lcg" in found
    assert "start/help" in found
    assert "engine/coded" not in found


def test_within_a_pair_the_order_alternates_and_ratios_keep_their_sides() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    row = Row(
        "g/row", "", Kind.SPEED, 2.0,
        sides(lambda: side("yardstick", 6.0), lambda: side("row", 2.0)),
    )  # fmt: skip
    [result] = measure([row], 3, quiet)
    assert order == ["yardstick", "row", "row", "yardstick", "yardstick", "row"]
    assert (result.ratios, result.reached) == ([3.0, 3.0, 3.0], True)
    assert (result.yardstick, result.unit) == (6.0, 2.0)


@pytest.mark.parametrize(
    ("kind", "ratio", "reached"),
    [(Kind.SPEED, 4.0, True), (Kind.TIME, 0.25, True)],
)
def test_speed_is_more_and_time_is_less_for_the_better(
    kind: Kind, ratio: float, reached: bool
) -> None:
    row = Row("g/row", "", kind, 1.0, sides(lambda: 4.0, lambda: 1.0))
    [result] = measure([row], 1, quiet)
    assert (result.median, result.reached) == (ratio, reached)
    worse = Row("g/row", "", kind, 1.0, sides(lambda: 1.0, lambda: 4.0))
    [result] = measure([worse], 1, quiet)
    assert result.reached is not reached


def test_a_row_that_cannot_be_measured_says_why_and_so_does_its_summary() -> None:
    @contextmanager
    def opened() -> Iterator[Sampler]:
        raise Unavailable("nothing is not installed")
        yield pair(float, float)

    lines: list[Line] = [
        fixed(4.0, 2.0),
        Row("g/absent", "", Kind.SPEED, 2.0, opened),
        Summary("g/worst", "", Kind.SPEED, 2.0, ("g/fixed", "g/absent")),
    ]
    results = {result.line.name: result for result in measure(lines, 2, quiet)}
    assert results["g/fixed"].ratios == [2.0, 2.0]
    for name in ("g/absent", "g/worst"):
        assert results[name].reached is None
        assert results[name].absent == "nothing is not installed"
    rows = as_json(list(results.values()), {})["rows"]
    assert [row.get("absent") for row in rows] == [None, *2 * ["nothing is not installed"]]


def test_the_worst_of_rows_is_the_one_whose_median_is() -> None:
    rows = [
        Row(f"g/{ratio}", "", Kind.TIME, None, sides(lambda: 1.0, partial(float, ratio)))
        for ratio in (1.0, 3.0, 2.0)
    ]
    of = tuple(row.name for row in rows)
    worst = Summary("g/worst", "", Kind.TIME, 2.5, of)
    median = Summary("g/median", "", Kind.TIME, 2.5, of, worst=False)
    results = measure([*rows, worst, median], 2, quiet)
    assert [(result.median, result.reached) for result in results[3:]] == [
        (3.0, False),
        (2.0, True),
    ]


def test_quartiles_are_those_of_the_pairs() -> None:
    result = Result(fixed(1.0, 1.0), [5.0, 1.0, 3.0, 2.0, 4.0])
    assert (result.median, result.quartiles) == (3.0, (2.0, 4.0))
    assert [number(value) for value in (123.4, 12.34, 1.234, 0.1234)] == [
        "123", "12.3", "1.23", "0.123",
    ]  # fmt: skip


def test_a_small_run_gives_well_formed_json_with_the_machines_facts() -> None:
    done = bench("messages/ask-nowait", "patches/grown-event-capacity", "--pairs", "2", "--json")
    assert done.stderr == ""
    tree = json.loads(done.stdout)
    assert {"processor", "processors", "python", "packages", "load_before", "pairs"} <= set(
        tree["machine"]
    )
    rows = {row["name"]: row for row in tree["rows"]}
    assert set(rows) == {
        "messages/ask-nowait",
        "patches/grown-event-capacity-4x256",
        "patches/grown-event-capacity-4x4096",
        "patches/grown-event-capacity",
    }
    for row in rows.values():
        assert len(row["pairs"]) == 2
        assert min(row["pairs"]) <= row["quartiles"][0] <= row["median"] <= row["range"][1]
        assert (row["reached"] is None) == (row["reach"] is None)
    assert rows["messages/ask-nowait"]["seconds"] > 0
    assert rows["patches/grown-event-capacity"]["reach"] == 1.3


def test_a_record_is_named_by_commit_and_date_and_names_no_machine(tmp_path: Path) -> None:
    done = bench("messages/ask-nowait", "--pairs", "1", "--record", str(tmp_path / "results"))
    [path] = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"(unknown|[0-9a-f]{12})(-dirty)?-\d{8}-\d{6}\.json", path.name)
    text = path.read_text(encoding="utf-8")
    assert platform.node() not in text.replace("-", " ").split()
    assert str(ROOT) not in text
    assert json.loads(text)["rows"][0]["name"] == "messages/ask-nowait"
    assert "messages/ask-nowait" in done.stdout
    assert "\x1b" not in done.stdout  # a pipe gets no colours
    assert "pairs a row, load" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [(("no/such",), "no row matches no/such"), (("--pairs", "0"), "--pairs 0: at least 1")],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    arguments: tuple[str, ...], cause: str
) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert cause in done.stderr.splitlines()[-1]


@pytest.mark.shows("S1")
@pytest.mark.parametrize("name", SCHEMES)
def test_under_every_scheme_the_small_guest_does_what_its_rows_say(name: str) -> None:
    """Every VCPU told derives, every store is seen as the scheme sees it, every event happens."""
    size = Size(vcpus=3, pages=16, told=3, rounds=2)
    run = SchemeRun(PRESETS[name], size)
    counted = run.counted
    assert set(run.seconds) == {"hidden", "load", "store", "event"}
    n_stores = size.rounds * N_CHANGED
    assert counted["cr3_load"] == size.rounds
    if name == "nested":
        assert counted.get("hidden_fault", 0) == 0
        return
    assert counted["hidden_fault"] >= size.pages * size.told
    if name in ("shootdown", "patch"):
        assert counted["emulated_store"] >= n_stores
    if name == "shootdown":
        assert counted["shootdown"] >= N_CHANGED * size.told
    if name in ("patch", "write-buffer"):
        assert counted["patch_applied"] >= n_stores
    if name == "write-buffer":
        assert counted["log_record"] >= size.rounds  # neighbours share one
        assert counted.get("emulated_store", 0) == 0
    if name == "out-of-sync":
        assert counted["resync_entry"] >= n_stores


def test_the_shadow_cache_saves_nine_of_ten_hidden_faults_of_processes_that_switch() -> None:
    [row] = [line for line in all_lines() if line.name == "schemes/switcher-faults"]
    [result] = measure([row], 1, quiet)
    assert result.reached, result.ratios
    table_row = as_json([result], {})["rows"][0]
    assert table_row["count"] < table_row["yardstick_count"]
    assert table_row["count"] == int(table_row["count"])
