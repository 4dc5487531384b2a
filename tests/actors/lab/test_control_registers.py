"""Loads of control registers that a CPU refuses: the guest gets #GP and nothing has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
from litmus_tests import ENTRIES, NO_WP, PAGE_ONE, PDE, PTE_ONE, WP, document, mov, one_test, read
from litmus_tests import write as store

from penumbra.actors.lab.litmus import LitmusRunner, Plan
from penumbra.actors.vmm.schemes import PRESETS

READ_ONLY = {PDE: "0x2027", PTE_ONE: "0x10065"}
NW_WITHOUT_CD = hex(int(NO_WP, 16) | 1 << 29)
LARGE = {"0x100c": "0x4000e7"}


@pytest.mark.shows("H2", "G6", "V5")
@pytest.mark.parametrize("scheme", ["native", "shootdown", "patch"])
@pytest.mark.parametrize(
    ("program", "outcome", "start"),
    [
        pytest.param(
            [mov("cr0", NW_WITHOUT_CD), store(PAGE_ONE, "0x7", "a", cpl=0)],
            ["PF:0x3"],
            {"cr0": WP, "entries": READ_ONLY},
            id="NW-without-CD-leaves-WP-set",
        ),
        pytest.param(
            [mov("cr0", hex(int(NO_WP, 16) | 3 << 29)), store(PAGE_ONE, "0x7", "a", cpl=0)],
            ["ok"],
            {"cr0": WP, "entries": READ_ONLY},
            id="NW-with-CD-is-taken",
        ),
        pytest.param(
            [mov("cr4", "0x2000"), read("0xc05000", "a")],
            ["0x405000"],
            {"entries": LARGE},
            id="a-reserved-bit-of-CR4-leaves-PSE-set",
        ),
        pytest.param(
            [read(PAGE_ONE, "a"), mov("cr4", "0x80000010"), read(PAGE_ONE, "b")],
            ["0x10000", "0x10000"],
            {"entries": ENTRIES},
            id="a-refused-load-is-no-event-and-loses-nothing",
        ),
    ],
)
def test_a_refused_load_changes_nothing(
    program: list[Any],
    outcome: list[str],
    start: dict[str, Any],
    scheme: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENUMBRA_ENGINE", "plain")
    test = one_test(tmp_path, document(program, allowed=[outcome], **start))
    finding = anyio.run(LitmusRunner(test, PRESETS[scheme]).explore, Plan())
    assert (list(finding.outcomes), finding.objections) == ([tuple(outcome)], [])
