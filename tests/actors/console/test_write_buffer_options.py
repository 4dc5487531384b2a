"""The write-buffer scheme from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Penumbra = Callable[..., tuple[int, str, str]]
TINY = ("--set", "workload.depth=1", "--set", "workload.rounds=1")
WRITE_BUFFER = ("--scheme", "write-buffer")


@pytest.mark.shows("S1", "S2", "H10")
def test_a_run_takes_the_buffers_options_and_keeps_them(penumbra: Penumbra) -> None:
    more = (
        "--set",
        "scheme.options.buffer.records=2",
        "--set",
        "scheme.options.buffer.combines=false",
    )
    code, out, err = penumbra("run", "fork-storm", *TINY, *WRITE_BUFFER, *more, "--json")
    said = json.loads(out)
    assert (code, err, said["verdict"]) == (0, "", "coherent")
    assert said["summary"]["exits"]["buffer full"] > 0
    assert "traced store" not in said["summary"]["exits"]


@pytest.mark.shows("EG1", "C2")
def test_a_fault_by_name_is_found_and_listed(penumbra: Penumbra) -> None:
    fault = ("--set", "scheme.options.buffer.fault=loss_ignored")
    words = ("run", "mmap-churn", "--set", "workload.steps=15", *WRITE_BUFFER, *fault)
    code, out, _ = penumbra(*words, "--set", "scheme.options.buffer.records=1")
    assert code == 1
    assert "INCOHERENT" in out
    listed = json.loads(penumbra("list", "faults", "--json")[1])["faults"]
    assert {row["name"]: row["kind"] for row in listed}["own_buffer_only"] == "printed"


@pytest.mark.parametrize(
    ("setting", "cause"),
    [
        ("buffer.fault=luck", "no write buffer fault 'luck'"),
        ("buffer.records=0", "options.buffer.records must be 1 .. 65536"),
        ("buffer.overflow=pray", "overflow"),
    ],
)
def test_what_a_buffer_cannot_be_is_refused_in_one_line(
    penumbra: Penumbra, setting: str, cause: str
) -> None:
    words = ("run", "fork-storm", *WRITE_BUFFER, "--set", f"scheme.options.{setting}")
    code, out, err = penumbra(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert cause in err
