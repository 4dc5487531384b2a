"""`penumbra run` and `compare` on real machines: what they print, leave and return."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penumbra.actors.console.execute import Outcome
from penumbra.actors.console.run import verdict_line
from penumbra.actors.console.workloads import shipped_recordings

Penumbra = Callable[..., tuple[int, str, str]]

# A fork and a handful of pages: a tenth of a second on the plain engine.
TINY = ("--set", "workload.pages=3", "--set", "workload.children=1", "--set", "workload.depth=1")
THREE = ("--schemes", "native,shootdown,patch")
BROKEN = ("--set", "scheme.options.order=left_unmarked")


def one_folder() -> Path:
    [folder] = Path("runs").iterdir()
    return folder


def test_a_run_prints_its_table_and_leaves_its_folder(penumbra: Penumbra) -> None:
    code, out, err = penumbra("run", "fork-storm", *TINY, "--seed", "5")
    folder = one_folder()
    assert (code, err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.toml", "events.npz", "summary.json", "verdict.json", "wall.json",
    ]  # fmt: skip
    summary = json.loads((folder / "summary.json").read_bytes())
    assert (summary["seed"], summary["scheme"], summary["ended"]) == (5, "patch", "finished")
    lines = out.splitlines()
    assert "  fork-storm  4 VCPUs x86-64  seed 5  " in lines[0]
    assert lines[3].split()[:2] == ["scheme", "exits"]
    assert lines[4].split()[0] == "patch"
    assert lines[4].endswith("  1.00  coherent")
    assert f"patch  {folder}/" in lines
    assert "\x1b" not in out


@pytest.mark.shows("K5")
def test_the_same_seed_gives_the_same_bytes_on_either_engine_and_loop_checked_or_not(
    penumbra: Penumbra,
) -> None:
    ways = [(), ("--loop", "asyncio"), ("--no-check",), ("--engine", "plain")]
    for number, way in enumerate(ways):
        assert penumbra("run", "fork-storm", *TINY, "--runs", f"runs{number}", *way)[0] == 0
    found = set()
    for number in range(len(ways)):
        [folder] = Path(f"runs{number}").iterdir()
        files = (folder / "summary.json", folder / "events.npz")
        found.add((folder.name, *(file.read_bytes() for file in files)))
    assert len(found) == 1


def test_a_second_run_of_the_same_configuration_finds_the_same(penumbra: Penumbra) -> None:
    assert penumbra("run", "fork-storm", *TINY)[0] == 0
    folder = one_folder()
    code, out, _ = penumbra("run", str(folder))
    assert (code, one_folder()) == (0, folder)
    assert f"{folder}/  (run before, with the same result)" in out
    assert len(json.loads((folder / "wall.json").read_bytes())) == 2


def test_another_result_under_the_same_id_is_an_error_that_names_both(penumbra: Penumbra) -> None:
    penumbra("run", "fork-storm", *TINY)
    folder = one_folder()
    (folder / "summary.json").write_text("{}")
    code, out, err = penumbra("run", "fork-storm", *TINY)
    assert (code, out) == (2, "")
    assert err == (
        f"penumbra: {folder}: run folder: differs in summary.json from this run, "
        f"kept in {folder}.differs-1\n"
    )
    assert (folder / "summary.json").read_text() == "{}"


def test_json_is_all_that_stands_on_stdout(penumbra: Penumbra) -> None:
    code, out, err = penumbra("run", "fork-storm", *TINY, "--json", "--scheme", "native")
    said: dict[str, Any] = json.loads(out)
    assert (code, err, said["exit_code"], said["verdict"]) == (0, "", 0, "coherent")
    assert said["summary"] == json.loads((Path(said["folder"]) / "summary.json").read_bytes())
    assert said["checker"] == json.loads((Path(said["folder"]) / "verdict.json").read_bytes())


@pytest.mark.shows("C1")
def test_a_run_without_a_checker_says_so_and_is_no_failure(penumbra: Penumbra) -> None:
    assert penumbra("run", "fork-storm", *TINY, "--no-check", "--quiet") == (
        0, "patch: UNCHECKED\n", "",
    )  # fmt: skip
    assert not (one_folder() / "verdict.json").exists()


def test_a_guest_that_ends_for_a_named_reason_is_shown_with_it(penumbra: Penumbra) -> None:
    words = ("run", "fork-storm", *TINY, "--set", "machine.max_progress=500")
    code, out, _ = penumbra(*words, "--quiet")
    assert (code, out) == (0, "patch: coherent; max_progress 500 reached by VCPU 0\n")
    assert "max_progress 500 reached by VCPU 0" in penumbra(*words)[1]
    assert "max_progress 500" in json.loads(penumbra(*words, "--json")[1])["summary"]["ended"]


@pytest.mark.shows("C1", "C2")
def test_a_broken_protocol_is_found_and_explained(penumbra: Penumbra) -> None:
    words = ("run", "shootdown-stress", "--set", "workload.rounds=2", *BROKEN)
    code, out, err = penumbra(*words)
    assert (code, err) == (1, "")
    assert "INCOHERENT" in out
    assert "the frame is none of the allowed ones" in out
    said = json.loads(penumbra(*words, "--json")[1])
    assert (said["exit_code"], said["verdict"]) == (1, "INCOHERENT")
    assert said["checker"]["violations"][0]["history"]


@pytest.mark.shows("C3", "G8")
def test_a_guests_own_mistakes_are_named_and_fail_the_run_only_by_wish(penumbra: Penumbra) -> None:
    bug = ("--scheme", "native", "--set", 'machine.guest_bugs=["skip-local-invlpg"]')
    code, out, err = penumbra("run", "fork-storm", *bug, "--set", "workload.depth=1")
    assert (code, err) == (1, "")  # for the wrong values that this guest finds
    assert "native  coherent: " in out
    assert "hazard: missing flush: PTE at gpa 0x" in out
    assert "hazards of the guest: " in out
    assert "(missing flush)" in out
    checker = {"n_hazards": 3, "hazards": [{"kind": "late"}]}
    summary: dict[str, Any] = {"marks": []}
    one = Outcome("s", "w", "f", False, 1, summary, "coherent", [], checker, "plain", {})
    assert (one.passes("report"), one.passes("fail")) == (True, False)
    assert verdict_line(replace(one, summary={"marks": [], "ended": "finished"})) == (
        "s: coherent; hazards of the guest: 3 uses of revoked translations (late flush)"
    )


@pytest.mark.shows("S2", "S3")
def test_schemes_are_compared_side_by_side(penumbra: Penumbra) -> None:
    code, out, err = penumbra("compare", "fork-storm", *TINY, "--jobs", "1", *THREE)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    table = lines[4:7]
    assert [line.split()[0] for line in table] == THREE[1].split(",")
    assert all(line.endswith("coherent") for line in table)
    assert "memory: agree (2 processes end with the same pages under every scheme)" in lines
    titles = ["where exits come from", "patch: channels, patches at the fullest / posted in all;"]
    assert all(any(line.startswith(title) for line in lines) for title in titles)
    assert lines[-7] == "try next"
    assert [line.split()[0] for line in lines[-6:]] == ["#", "penumbra"] * 3
    assert len(list(Path("runs").iterdir())) == 3


def test_costs_relate_to_the_base_that_was_asked_for(penumbra: Penumbra) -> None:
    words = ("compare", "fork-storm", *TINY, "--jobs", "1", "--schemes", "native,patch")
    said = json.loads(penumbra(*words, "--base", "patch", "--json")[1])
    costs = {one["scheme"]: one["summary"]["cost"] for one in said["schemes"]}
    assert {one["scheme"]: one["ratio"] for one in said["schemes"]} == {
        "native": costs["native"] / costs["patch"], "patch": 1.0,
    }  # fmt: skip
    assert (said["base"], said["memory"]) == ("patch", {"agree": True, "differ": []})


def test_quiet_says_one_line_per_scheme(penumbra: Penumbra) -> None:
    words = ("compare", "fork-storm", *TINY, "--jobs", "1", "--quiet", *THREE)
    assert penumbra(*words) == (0, "native: coherent\nshootdown: coherent\npatch: coherent\n", "")


def test_workers_give_what_one_process_gives(penumbra: Penumbra) -> None:
    words = ("compare", "fork-storm", *TINY, *THREE, "--json")
    alone = json.loads(penumbra(*words, "--jobs", "1", "--runs", "alone")[1])
    code, out, err = penumbra(*words, "--jobs", "2", "--runs", "together")
    together = json.loads(out)
    assert (code, err) == (0, "")
    for said in (alone, together):
        for one in said["schemes"]:
            del one["wall"], one["folder"]
    assert together == alone


@pytest.mark.shows("C5")
def test_guests_that_end_with_other_memory_are_named_and_fail_the_comparison(
    penumbra: Penumbra,
) -> None:
    words = ("compare", "shootdown-stress", "--set", "workload.rounds=2", "--jobs", "1", *BROKEN)
    code, out, _ = penumbra(*words, "--schemes", "native,patch", "--no-check")
    # Unchecked: nothing but the guest's own words and memory can tell.
    assert code == 1
    assert "wrong values found by the guest" in out


def test_a_worker_that_refuses_its_job_is_heard(penumbra: Penumbra) -> None:
    Path("runs").write_text("")
    code, out, err = penumbra("compare", "fork-storm", *TINY, "--jobs", "2")
    assert (code, out) == (2, "")
    assert err.startswith("penumbra: runs/fork-storm-")
    assert err.endswith("Not a directory\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run",), "penumbra run: the following arguments are required: WORKLOAD"),
        (("run", "fork-storm", "--bogus"), "penumbra: unrecognized arguments: --bogus"),
        (
            ("run", "fork-strm"),
            "no workload or file is named 'fork-strm' (did you mean fork-storm?)",
        ),
        (("run", "fork-storm", "--scheme", "x"), "no scheme is named 'x' (known: native"),
        (("run", "fork-storm", "--vcpus", "0"), "--vcpus 0: is 0: must be 1 .. 16"),
        (("run", "fork-storm", "--seed", "-1"), "--seed -1: Expected `int` >= 0"),
        (("compare", "fork-storm", "--schemes", "native,native"), "a scheme is named twice"),
        (("compare", "fork-storm", "--schemes", "native,"), "a name is empty"),
        (("compare", "fork-storm", "--base", "x"), "is none of those compared: native"),
        (("compare", "fork-storm", "--jobs", "0"), "--jobs 0: must be at least 1"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    words: tuple[str, ...], expected: str, penumbra: Penumbra
) -> None:
    code, out, err = penumbra(*words)
    assert (code, out) == (2, "")
    assert err.startswith("penumbra: command line: ")
    assert expected in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def damaged(kind: str) -> bytes:
    data = shipped_recordings()["pipeline"].read_bytes()
    return {
        "empty": b"",
        "text": b"no recording\n",
        "version": data[:8] + b"\x63" + data[9:],
        "header": data[:100],
        "cut": data[: len(data) // 2],
        "flipped": data[: len(data) // 2] + b"????" + data[len(data) // 2 + 4 :],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "version", "header", "cut", "flipped"])
def test_a_recording_that_cannot_be_read_is_named_with_place_and_cause(
    kind: str, penumbra: Penumbra
) -> None:
    Path("bad.trace").write_bytes(damaged(kind))
    Path("bad.toml").write_text('[workload]\ntrace = "bad.trace"\n')
    for words in (("run", "bad.trace"), ("run", "bad.toml"), ("trace", "info", "bad.trace")):
        code, out, err = penumbra(*words)
        assert (code, out) == (2, "")
        assert err.startswith("penumbra: bad.trace: ")
        assert err.count("\n") == 1
        assert err.count(": ") >= 3
    assert not Path("runs").exists()


def test_a_guest_too_large_for_its_machine_is_refused_before_anything_is_written(
    penumbra: Penumbra,
) -> None:
    for setting in ("machine.ram_mib=1", "workload.pages=5000000"):
        code, out, err = penumbra("run", "fork-storm", "--set", setting)
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert not Path("runs").exists()


def on_terminal(*words: str, environment: dict[str, str]) -> tuple[str, str]:
    """Run the command with stdout and stderr on terminals of their own; return both."""
    terminals = [pty.openpty(), pty.openpty()]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "penumbra.actors.console.main", *words],
        stdout=terminals[0][1],
        stderr=terminals[1][1],
        env=os.environ
        | {"TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": os.pathsep.join(sys.path)}
        | environment,
    )
    texts = []
    for _, theirs in terminals:
        os.close(theirs)
    for ours, _ in terminals:
        text = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                part = b""
            if not part:
                break
            text += part
        os.close(ours)
        texts.append(text.decode())
    assert process.wait() == 0
    return texts[0], texts[1]


def test_a_terminal_gets_colours_and_progress_unless_it_wants_none(penumbra: Penumbra) -> None:
    words = ("run", "fork-storm", *TINY)
    out, err = on_terminal(*words, environment={"NO_COLOR": ""})
    assert "\x1b[32m" in out
    assert "patch" in err
    plain, _ = on_terminal(*words, environment={"NO_COLOR": "1"})
    assert "\x1b" not in plain
    table = plain.replace("\r\n", "\n").splitlines()[:5]
    assert table == penumbra(*words)[1].splitlines()[:5]
    _, silent = on_terminal(*words, "--quiet", environment={})
    assert silent == ""
