"""`penumbra paper`: cheap rows from the command line to the table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

Penumbra = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.shows("H11")


def test_a_row_is_predicted_by_runs_that_its_commands_repeat(penumbra: Penumbra) -> None:
    code, out, err = penumbra("paper", "--rows", "R4", "--json", "--jobs", "1", "--seed", "3")
    assert (code, err) == (0, "")
    said = json.loads(out)
    by_what = {row["what"]: row for row in said["rows"]}
    syscall = by_what["syscall, HW VMM / native"]
    assert syscall["published"] == {"tag": "published", "text": "1 x"}
    assert syscall["model"]["tag"] == "predicted"
    # No system call exits on hardware that assists: the only claim of R4 that is exact.
    assert syscall["model"]["value"] == pytest.approx(1)
    assert 0 < by_what["syscall, BT VMM - native"]["model"]["value"] < 10_000
    assert by_what["in, HW VMM / native"]["model"]["tag"] == "none"
    assert by_what["in, HW VMM / native"]["note"]

    commands = {one["number"]: one for one in said["commands"]}
    first = commands[syscall["commands"][0]]
    words = shlex.split(first["command"])[1:]
    again = json.loads(penumbra(*words, "--json")[1])
    assert again["folder"] == first["folder"]  # the same run, not one like it
    assert len(json.loads((Path(first["folder"]) / "wall.json").read_text())) == 2


def test_the_table_tags_every_cell_and_lists_the_commands(penumbra: Penumbra) -> None:
    code, out, err = penumbra("paper", "--rows", "r1,R10", "--jobs", "1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    rows = [line for line in lines if line.startswith(("R1 ", "R10 "))]
    calibrated = [line for line in rows if " calibrated " in line]
    assert len(calibrated) == 3
    assert all(line.endswith("[0]") for line in calibrated)
    assert any(" predicted " in line for line in rows)
    assert any("not modelled" in line for line in rows)
    assert any(line.startswith("  [0] ") and line.endswith(" list costs") for line in lines)
    assert any(line.startswith("  [1] ") and "--set costs.profile=" in line for line in lines)
    assert "\x1b" not in out


def test_rows_that_need_no_run_print_at_once(penumbra: Penumbra) -> None:
    code, out, _ = penumbra("paper", "--rows", "R13", "--quiet")
    assert code == 0
    assert out.splitlines() == [
        "R13 hardware coherence of nested translations, KVM: published up to +30 %; not modelled",
        "R13 hardware coherence of nested translations, Xen: published up to +33 %; not modelled",
    ]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--rows", "R99"), "no row is named 'R99'"),
        (("--rows", ""), "no row is named ''"),
        (("--jobs", "0", "--rows", "R7"), "must be at least 1"),
    ],
)
def test_a_row_or_number_that_is_not_there_is_refused_in_one_line(
    words: tuple[str, ...], why: str, penumbra: Penumbra
) -> None:
    code, out, err = penumbra("paper", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert why in err
