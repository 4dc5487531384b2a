"""`penumbra check`: exit codes, names, explanations, JSON, and one line for what is no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from machines import FAMILIES

DATA = Path(__file__).resolve().parents[2] / "data"
MMU, WALK = str(DATA / "mmu_cases_sample.npz"), str(DATA / "walk_sample_ia32.npz")

Penumbra = Callable[..., tuple[int, str, str]]


def wrong(name: str, column: str, flip: int, n: int) -> str:
    """Write a copy of a sample with `n` wrong rows here; return its name."""
    with np.load(DATA / name) as file:
        arrays = {key: file[key].copy() for key in file.files}
    arrays[column][:n] ^= arrays[column].dtype.type(flip)
    np.savez("wrong.npz", **arrays)
    return "wrong.npz"


@pytest.mark.shows("H2")
@pytest.mark.parametrize("scheme", FAMILIES)
def test_recorded_accesses_pass_and_say_under_what(penumbra: Penumbra, scheme: str) -> None:
    code, out, err = penumbra("check", "mmu", MMU, "--scheme", scheme)
    assert (code, err) == (0, "")
    assert out == f"{MMU}: 2,000 cases under {scheme}: all passed\n"


@pytest.mark.shows("H2")
def test_a_kernels_tables_pass(penumbra: Penumbra) -> None:
    code, out, err = penumbra("check", "walk", WALK)
    assert (code, err) == (0, "")
    assert out == f"{WALK}: 2 snapshots, 4 cpus, 18,722 mappings: all passed\n"


def test_every_failed_case_is_named_and_the_first_twenty_are_explained(penumbra: Penumbra) -> None:
    code, out, err = penumbra("check", "mmu", wrong("mmu_cases_sample.npz", "fault", 1, 35))
    lines = out.splitlines()
    assert (code, err) == (1, "")
    assert lines[0].startswith("case 0: write of 4 at 0xf4ca0fff, CPL 0")
    assert lines[0].endswith("; no fault, expected a page fault with error 0x0")
    assert [line.partition(":")[0] for line in lines[:20]] == [f"case {i}" for i in range(20)]
    assert lines[20] == "failed too: " + ", ".join(f"case {i}" for i in range(20, 30))
    assert lines[21] == "failed too: " + ", ".join(f"case {i}" for i in range(30, 35))
    assert lines[22:] == ["wrong.npz: 2,000 cases under native: 35 FAILED"]


def test_json_holds_all_names_and_nothing_else_is_printed(penumbra: Penumbra) -> None:
    name = wrong("walk_sample_ia32.npz", "s1_cpu1_flags", 2, 30)
    code, out, err = penumbra("check", "walk", name, "--json")
    said = json.loads(out)
    assert (code, err) == (1, "")
    assert (said["check"], said["file"], said["passed"]) == ("walk", name, False)
    assert (said["snapshots"], said["cpus"], said["mappings"]) == (2, 4, 18722)
    assert (len(said["failed"]), len(said["explained"])) == (30, 20)
    assert said["failed"][0] == said["explained"][0]["name"]
    assert said["failed"][0].startswith("snapshot 1 CPU 1 address 0x8")
    passed = json.loads(penumbra("check", "mmu", MMU, "--json", "--scheme", "patch")[1])
    assert passed == {
        "cases": 2000, "check": "mmu", "explained": [], "failed": [], "file": MMU, "passed": True,
        "scheme": "patch",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("check", "mmu", "absent.npz"), "absent.npz: read: No such file or directory"),
        (("check", "mmu", WALK), f"{WALK}: arrays: cr0, cr3, "),
        (("check", "walk", MMU), f"{MMU}: meta: missing"),
        (("check", "walk", __file__), f"{__file__}: arrays: damaged or no .npz file"),
        (("check", "mmu", MMU, "--scheme", "x"), "command line: --scheme: no scheme 'x' (known: "),
        (("check", "tlb", MMU), "command line: penumbra check: "),
        (("check", "walk", "."), ".: read: Is a directory"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    penumbra: Penumbra, words: tuple[str, ...], says: str
) -> None:
    code, out, err = penumbra(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"penumbra: {says}")
    assert err.count("\n") == 1
