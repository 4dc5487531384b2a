"""Litmus tests made in tests: words of the file's format, spelt short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penumbra.guest.litmus import LitmusTest, read_tests

SAMPLE = Path(__file__).parents[1] / "data" / "litmus_sample.json"
WP, NO_WP, NO_PAGING = "0x80010011", "0x80000011", "0x11"
PAGE_ONE, PAGE_TWO = "0x801000", "0x802000"
PTE_ONE, PTE_TWO, PDE = "0x2004", "0x2008", "0x1008"
ENTRIES = {PDE: "0x2027", PTE_ONE: "0x10067", PTE_TWO: "0x11067"}

Operation = dict[str, Any]


def read(la: str, name: str, cpl: int = 3) -> Operation:
    return {"op": "read", "la": la, "cpl": cpl, "as": name}


def write(la: str, val: str, name: str, cpl: int = 3) -> Operation:
    return {"op": "write", "la": la, "val": val, "cpl": cpl, "as": name}


def set_entry(pa: str, val: str) -> Operation:
    return {"op": "set_entry", "pa": pa, "val": val}


def get_entry(pa: str, mask: str, name: str) -> Operation:
    return {"op": "get_entry", "pa": pa, "mask": mask, "as": name}


def xchg_entry(pa: str, val: str, mask: str, name: str) -> Operation:
    return {"op": "xchg_entry", "pa": pa, "val": val, "mask": mask, "as": name}


def invlpg(la: str) -> Operation:
    return {"op": "invlpg", "la": la}


def mov(register: str, val: str) -> Operation:
    return {"op": f"mov_{register}", "val": val}


def barrier(name: str) -> Operation:
    return {"op": "barrier", "id": name}


def document(
    *programs: list[Operation],
    allowed: list[list[str]],
    entries: dict[str, str] | None = None,
    cr0: str = WP,
    cr4: str = "0x10",
    **fields: Any,
) -> dict[str, Any]:
    """Return one test as the file has it; observed are all registers, in order of programs."""
    names = [step["as"] for program in programs for step in program if "as" in step]
    start = {"cr0": cr0, "cr3": "0x1000", "cr4": cr4}
    found = ENTRIES if entries is None else entries
    return {
        "id": "made",
        "init": {
            "cpus": [start for _ in programs],
            "entries": [{"pa": pa, "val": val} for pa, val in found.items()],
        },
        "programs": list(programs),
        "observed": names,
        "allowed": allowed,
        **fields,
    }


def one_test(folder: Path, said: dict[str, Any]) -> LitmusTest:
    """Read one test back from a file."""
    path = folder / "litmus.json"
    path.write_text(json.dumps([said]))
    return read_tests(path)[0]
