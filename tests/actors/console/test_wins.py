"""Which scheme wins where and why: the sums are the costs, the tables stay readable."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penumbra.actors.console import wins
from penumbra.actors.console.execute import Outcome
from penumbra.actors.console.progress import ProgressBars
from penumbra.actors.console.tables import Paper
from penumbra.actors.console.views import WIDTH, exits, schemes
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.hw.costs import CostProfile

Penumbra = Callable[..., tuple[int, str, str]]

TINY = ("--set", "workload.pages=3", "--set", "workload.children=1", "--set", "workload.depth=1")
COMPARE = ("compare", "fork-storm", *TINY, "--jobs", "1", "--schemes", "native,shootdown,patch")


def outcome(scheme: str, reasons: dict[str, int] | None = None, **counters: int) -> Outcome:
    reasons = reasons or {}
    whole = {**counters, "exit": sum(reasons.values())} if reasons else counters
    cost = CostProfile().cost(whole)
    summary: dict[str, Any] = {
        "counters": whole,
        "cost": cost,
        "exits": reasons,
        "ended": "finished",
    }
    return Outcome(scheme, "w", "runs/x", False, 64, summary, "coherent", [], None, "plain", {})


@pytest.mark.shows("S3")
def test_the_causes_of_a_difference_add_up_to_it(penumbra: Penumbra) -> None:
    said = json.loads(penumbra(*COMPARE, "--json")[1])
    costs = {one["scheme"]: one["summary"]["cost"] for one in said["schemes"]}
    found = said["wins"]["difference"]
    monitored = sorted((costs[name], name) for name in ("shootdown", "patch"))
    assert [found["cheapest"], found["dearest"]] == [name for _, name in monitored]
    assert found["cycles"] == monitored[1][0] - monitored[0][0] > 0
    assert sum(cause["cycles"] for cause in found["causes"]) == found["cycles"]
    sizes = [abs(cause["cycles"]) for cause in found["causes"]]
    assert sizes == sorted(sizes, reverse=True)
    assert said["wins"]["compared"] == ["shootdown", "patch"]
    text = penumbra(*COMPARE)[1]
    assert f"{found['dearest']} costs " in text
    assert "left out, because nothing there exits to a monitor: native" in text


@pytest.mark.shows("S3")
def test_each_measure_names_who_has_least_and_who_most() -> None:
    outcomes = [
        outcome("bare", progress=10),
        outcome("a", {"x": 5, "y": 1}, progress=10, shootdown=9, tlb_miss=4),
        outcome("b", {"x": 2}, progress=10, patch_posted=7, tlb_miss=4),
        outcome("c", {"x": 2}, progress=10, patch_posted=9, tlb_miss=4, hidden_fault=1),
    ]
    found = {win.measure: win for win in wins.wins(outcomes)}
    assert found["exits"] == wins.Win("exits", ("b", "c"), 2, ("a",), 6)
    assert found["patches"] == wins.Win("patches", ("b",), 7, ("c",), 9)  # of those that post any
    assert found["shootdowns"] == wins.Win("shootdowns", ("b", "c"), 0, ("a",), 9)
    assert set(found) == {"cost", "exits", "hidden faults", "patches", "shootdowns"}
    why = wins.difference(outcomes, CostProfile())
    assert why is not None
    assert (why.cheapest.scheme, why.dearest.scheme) == ("b", "a")
    unit = CostProfile()
    assert [(cause.name, cause.cycles) for cause in why.causes] == [
        ("shootdown", 9 * unit.shootdown),
        ("exit: x", 3 * unit.exit),
        ("exit: y", unit.exit),
        ("patch_posted", -7 * unit.patch_posted),
    ]


def test_schemes_that_cost_the_same_have_no_difference() -> None:
    same = [outcome(name, {"x": 3}, progress=10) for name in ("a", "b")]
    assert wins.difference(same, CostProfile()) is None
    assert wins.wins(same) == []


def test_the_tables_of_fifteen_schemes_fit_120_columns(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = {f"reason {n}": 123_456 * (n + 1) for n in range(12)}
    many = [
        outcome(f"a-long-name-{n:02}", reasons, progress=10**9 + n, patch_posted=10**6, ipi=n)
        for n in range(15)
    ]
    schemes(Paper(), many, many[0])
    exits(Paper(), many)
    wins.show(Paper(), many, CostProfile())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines.count("where exits come from") > 1
    heads = [line for line in lines if line.startswith("reason  ")]
    assert [name for head in heads for name in head.split()[1:]] == [one.scheme for one in many]


class Terminal:
    """What a stream needs to pass for a terminal; keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("lines", "together"), [("40", False), ("10", True)])
def test_many_schemes_share_one_bar_where_the_terminal_is_low(
    lines: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"LINES": lines, "COLUMNS": "110", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    names = [f"scheme-{n}" for n in range(15)]
    with ProgressBars(names, quiet=False) as bars:
        some = bars.of([3, 4])
        some.start(0)
        some.reach(0, 0.5)
        some.end(0, "coherent")
        some.start(1)
        some.refresh()
        shown = terminal.text
    assert ("15 schemes" in shown) == together
    assert ("1 of 15 done; runs: scheme-4" in shown) == together
    assert ("scheme-14" in shown) != together


def test_adding_a_scheme_touches_no_driver() -> None:
    top = Path(wins.__file__).parents[1]
    named = [name for name in PRESETS if name != "native"]
    for path in (top / "machine").glob("*.py"):
        text = path.read_text()
        assert not [name for name in named if f'scheme.name == "{name}"' in text], path
        assert "scheme.name ==" not in text, path
