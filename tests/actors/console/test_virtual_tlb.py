"""The command runs the methods of VTLB on a processor and its memory. Source: VTLB Fig. 11."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Penumbra = Callable[..., tuple[int, str, str]]


@pytest.mark.shows("VTLB Fig 11", "VTLBc 28", "VTLBc 29", "VTLBc 30")
def test_a_virtual_tlb_lazy_or_eager_does_what_the_processors_own_does(penumbra: Penumbra) -> None:
    words = ("compare", "shootdown-stress", "--set", "workload.rounds=2", "--jobs", "1")
    code, out, err = penumbra(*words, "--schemes", "native,vtlb,vtlb-eager", "--json")
    said = json.loads(out)
    assert (code, err, said["memory"]) == (0, "", {"agree": True, "differ": []})
    runs = {one["scheme"]: one["summary"] for one in said["schemes"]}
    hidden = {name: summary["counters"].get("hidden_fault", 0) for name, summary in runs.items()}
    assert hidden["native"] == 0 < hidden["vtlb-eager"] < hidden["vtlb"]
    native = runs["native"]["counters"]
    for name in ("vtlb", "vtlb-eager"):
        exits = runs[name]["exits"]
        assert (exits["invlpg"], exits["cr3_load"]) == (native["invlpg"], native["cr3_load"])
        assert "traced store" not in exits
