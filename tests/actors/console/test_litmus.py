"""`penumbra litmus`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from litmus_tests import PAGE_ONE, SAMPLE, document, invlpg, read, set_entry

from penumbra.actors.vmm.schemes import PRESETS

Penumbra = Callable[..., tuple[int, str, str]]


def _failing(name: str = "made") -> dict[str, object]:
    said = document(
        [read(PAGE_ONE, "a"), set_entry("0x2004", "0x12067"), invlpg(PAGE_ONE)],
        [read(PAGE_ONE, "b")],
        allowed=[["0x10000", "0x12000"]],
        title="too strict",
        sdm="4.10.5",
        rationale="made to fail",
    )
    return {**said, "id": name}


@pytest.mark.shows("H5")
def test_the_sample_passes_under_every_scheme(penumbra: Penumbra) -> None:
    code, out, err = penumbra("litmus", str(SAMPLE))
    assert (code, err) == (0, "")
    rows = [line.split()[:3] for line in out.splitlines()[2 : 2 + len(PRESETS)]]
    assert rows == [[name, "21", "0"] for name in PRESETS]
    assert "stale outcomes not reached under native" not in out
    assert "stale outcomes not reached under shootdown: remap-noflush, " in out
    assert penumbra("litmus", str(SAMPLE), "--quiet", "--schedules", "2") == (
        0,
        f"{21 * len(PRESETS)} passed\n",
        "",
    )


def test_json_says_what_each_test_showed(penumbra: Penumbra) -> None:
    words = ("litmus", str(SAMPLE), "--json", "--scheme", "native")
    code, out, err = penumbra(*words)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["passed"], said["failed"], said["schedules"]) == (21, 0, "all")
    assert said["tests"][0] == {
        "id": "remap-noflush",
        "scheme": "native",
        "passed": True,
        "orders": 1,
        "runs": 1,
        "cut": False,
        "observed": ["a", "b"],
        "outcomes": [
            {"values": ["0x10000", "0x10000"], "schedule": [0, 0, 0], "hardware": "usual"}
        ],
        "allowed": [["0x10000", "0x10000"], ["0x10000", "0x12000"]],
        "allowed_extra": [],
        "wrong": [],
        "speculative": [],
        "stale_reached": [["0x10000", "0x10000"]],
        "stale_not_reached": [],
        "objections": [],
    }
    assert penumbra(*words) == (code, out, err)


def test_a_failing_test_is_named_and_explained_with_its_schedule(penumbra: Penumbra) -> None:
    Path("mine.json").write_text(json.dumps([_failing()]))
    code, out, err = penumbra("litmus", "mine.json", "--scheme", "native")
    assert (code, err) == (1, "")
    assert out[out.index("FAILED") :] == (
        "FAILED made under native: too strict\n"
        "  outcome a=0x10000 b=0x10000 is not permitted\n"
        "  schedule 0,1,0,0\n"
        "    CPU 0  read la 0x801000 cpl 3 as a\n"
        "    CPU 1  read la 0x801000 cpl 3 as b\n"
        "    CPU 0  set_entry pa 0x2004 val 0x12067\n"
        "    CPU 0  invlpg la 0x801000\n"
        "  permitted: a=0x10000 b=0x12000\n"
        "  SDM 4.10.5: made to fail\n"
    )


def test_a_file_cannot_write_to_the_terminal(penumbra: Penumbra) -> None:
    Path("mine.json").write_text(json.dumps([_failing("\x1b[2J\nmade")]))
    out = penumbra("litmus", "mine.json", "--scheme", "native", "--quiet")[1]
    assert out == "FAILED ?[2J?made under native: too strict\n"


def test_every_failing_test_is_named_and_twenty_are_explained(penumbra: Penumbra) -> None:
    Path("mine.json").write_text(json.dumps([_failing(f"t{n}") for n in range(23)]))
    code, out, _ = penumbra("litmus", "mine.json", "--scheme", "native")
    assert code == 1
    assert out.count("FAILED t") == 23
    assert out.count("is not permitted") == 20
    quiet = penumbra("litmus", "mine.json", "--scheme", "native", "--quiet")[1]
    assert quiet.splitlines()[22] == "FAILED t22 under native: too strict"
    assert len(quiet.splitlines()) == 23


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("no.json",), "no.json: open: No such file or directory"),
        ((".",), ".: open: Is a directory"),
        (("bad.json",), "bad.json: tests[0]: Object missing required field `id`"),
        (("mine.json", "--schedules", "0"), "--schedules 0: must be 'all' or a number from 1"),
        (("mine.json", "--schedules", "some"), "--schedules some: must be 'all' or a number"),
        (("mine.json", "--scheme", "vapour"), "--scheme vapour: no 'vapour' among native, "),
    ],
)
def test_what_cannot_be_used_is_one_line(
    words: tuple[str, ...], said: str, penumbra: Penumbra
) -> None:
    Path("mine.json").write_text(json.dumps([_failing()]))
    Path("bad.json").write_text("[{}]")
    code, out, err = penumbra("litmus", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
