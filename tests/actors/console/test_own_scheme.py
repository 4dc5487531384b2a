"""A scheme of one's own is a table in a file: the command runs it, and no driver knows its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Penumbra = Callable[..., tuple[int, str, str]]

MACHINE = """
[machine]
vcpus = 2
[workload]
name = "mmap-churn"
processes = 2
steps = 12
pages = 8
[scheme]
name = "mine"
"""


@pytest.mark.shows("S1")
@pytest.mark.parametrize(
    ("policies", "has", "lacks"),
    [
        (("write-trace", "shootdown", "update", "per-cpu"), "shootdown", "patch_posted"),
        (("write-buffer", "shootdown", "invalidate", "per-cpu"), "shootdown", "patch_posted"),
        (("write-buffer", "patch", "invalidate", "per-cpu"), "patch_posted", "shootdown"),
        (("write-trace", "patch", "invalidate", "shared"), "patch_posted", "shootdown"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_composition_that_is_no_preset_runs_coherent_and_leaves_the_memory_of_native(
    penumbra: Penumbra, policies: tuple[str, ...], has: str, lacks: str
) -> None:
    names = ("detect", "propagate", "apply", "shadow")
    lines = (f'{name} = "{value}"\n' for name, value in zip(names, policies, strict=True))
    Path("mine.toml").write_text(MACHINE + "".join(lines), encoding="utf-8")
    words = ("compare", "mine.toml", "--jobs", "1", "--schemes", "native,mine", "--json")
    code, out, err = penumbra(*words)
    said = json.loads(out)
    assert (code, err, said["memory"]) == (0, "", {"agree": True, "differ": []})
    counters = {one["scheme"]: one["summary"]["counters"] for one in said["schemes"]}["mine"]
    assert counters.get(has, 0) > 0
    assert counters.get(lacks, 0) == 0
