"""`penumbra list` and `penumbra trace`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from penumbra.actors.core import SWITCHES
from penumbra.actors.vmm.schemes import PRESETS, SchemeOptions
from penumbra.guest.traces import read_recording

Penumbra = Callable[..., tuple[int, str, str]]

_LOG = """\
==7== Lackey, an example Valgrind tool
==7== Using Valgrind-3.19.0 and LibVEX; rerun with -h for copyright info
==7== Command: ./program
==7== Parent PID: 6
==7==
SYSCALL[7,1](12) sys_brk ( 0x0 ) --> [pre-success] Success(0x4800000)
I  00001000,4
 S 1ffeffe8,8
 L 00002000,8
SYSCALL[7,1](231) exit_group( 0 )
==7==
"""


def test_everything_that_can_be_named_is_listed(penumbra: Penumbra) -> None:
    code, out, err = penumbra("list")
    assert (code, err) == (0, "")
    names = {line.split()[0] for line in out.splitlines() if line}
    assert names >= {"workloads", "fork-storm", "pipeline", "native", "shootdown", "patch"}
    assert names >= set(SWITCHES) >= {"free_last"}
    said = json.loads(penumbra("list", "--json")[1])
    assert list(said) == ["costs", "faults", "profiles", "recordings", "schemes", "workloads"]
    assert {row["name"]: row for row in said["schemes"]}["patch"]["propagate"] == "patch"


@pytest.mark.shows("S1", "S2")
def test_each_scheme_is_listed_as_its_composition(penumbra: Penumbra) -> None:
    rows = {
        row["name"]: row for row in json.loads(penumbra("list", "schemes", "--json")[1])["schemes"]
    }
    assert list(rows) == list(PRESETS)
    for name, scheme in PRESETS.items():
        row = rows[name]
        policies = (row["detect"], row["propagate"], row["apply"], row["shadow"])
        assert policies == (scheme.detect, scheme.propagate, scheme.apply, scheme.shadow)
        default = SchemeOptions()
        for option, value in row["options"].items():
            assert value == getattr(scheme.options, option) != getattr(default, option)
        assert row["about"] == scheme.about != ""
    head, *lines = penumbra("list", "schemes")[1].splitlines()[1:]
    words = ["name", "detect", "propagate", "apply", "shadow", "options", "about"]
    assert (head.split(), [line.split()[0] for line in lines]) == (words, list(PRESETS))


def test_one_list_alone_can_be_asked_for(penumbra: Penumbra) -> None:
    assert penumbra("list", "schemes", "--quiet") == (0, "".join(f"{n}\n" for n in PRESETS), "")
    code, out, err = penumbra("list", "nonsense")
    assert (code, out) == (2, "")
    assert "invalid choice: 'nonsense'" in err
    assert err.count("\n") == 1


def test_a_recording_says_what_it_holds(penumbra: Penumbra) -> None:
    code, out, _ = penumbra("trace", "info", "pipeline")
    said = json.loads(penumbra("trace", "info", "pipeline", "--json")[1])
    assert code == 0
    assert f"{said['references']:,} in {said['runs']:,} page runs" in out
    assert f"guest RAM  {said['guest_ram_bytes'] >> 20} MiB" in out
    quiet = penumbra("trace", "info", "pipeline", "--quiet")[1]
    assert quiet.endswith(f"{said['processes']} processes, {said['references']} references\n")


def test_logs_are_imported_and_the_recording_runs(penumbra: Penumbra) -> None:
    Path("log.7").write_text(_LOG)
    code, out, err = penumbra(
        "trace", "import", "--lackey", "log.7", "-o", "mine.trace", "--provenance", "by hand"
    )
    assert (code, err) == (0, "")
    assert "recorded   by hand [valgrind 3.19.0 lackey]" in out
    assert read_recording(Path("mine.trace")).n_references == 3
    assert penumbra("run", "mine.trace", "--quiet") == (0, "patch: coherent\n", "")


def test_an_existing_file_is_not_written_over_unless_told_to(penumbra: Penumbra) -> None:
    Path("log.7").write_text(_LOG)
    Path("mine.trace").write_text("precious")
    words = ("trace", "import", "--lackey", "log.7", "-o", "mine.trace", "--quiet")
    code, out, err = penumbra(*words)
    assert (code, out) == (2, "")
    assert err == "penumbra: mine.trace: write: exists already and is not overwritten\n"
    assert Path("mine.trace").read_text() == "precious"
    assert penumbra(*words, "--force") == (0, "mine.trace: 1 processes, 3 references\n", "")


@pytest.mark.parametrize(
    ("log", "place"),
    [("", "whole log"), (_LOG.replace(" S 1ffeffe8,8", " S zzz,8"), "line 8")],
)
def test_a_log_that_cannot_be_used_is_named_with_its_line(
    log: str, place: str, penumbra: Penumbra
) -> None:
    Path("log.7").write_text(log)
    code, out, err = penumbra("trace", "import", "--lackey", "log.7", "-o", "mine.trace")
    assert (code, out) == (2, "")
    assert err.startswith(f"penumbra: log.7: {place}: ")
    assert err.count("\n") == 1
    assert not Path("mine.trace").exists()


def test_a_missing_log_is_one_line(penumbra: Penumbra) -> None:
    code, out, err = penumbra("trace", "import", "--lackey", "log.7", "-o", "mine.trace")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("penumbra: log.7: ")
