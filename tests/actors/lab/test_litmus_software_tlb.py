"""Every order of the litmus tests where software fills the TLBs: nothing but what is permitted."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest
from litmus_tests import SAMPLE

from penumbra.actors.lab.litmus import LitmusRunner, Plan
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.machine import Machine
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.litmus import LitmusTest, read_tests

TESTS = read_tests(SAMPLE)


def managed_by_software(config: MachineConfig, *parts: Any) -> Machine:
    config = msgspec.structs.replace(config, tlb="software", spurious_faults=False)
    return Machine(config, *parts)


@pytest.mark.shows("H12", "H5", "H6", "H7", "P5", "C1")
@pytest.mark.parametrize("scheme", ["native", "shootdown", "patch"])
@pytest.mark.parametrize("test", TESTS, ids=[test.id for test in TESTS])
def test_every_order_ends_as_the_architecture_permits(
    test: LitmusTest, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENUMBRA_ENGINE", "plain")
    runner = LitmusRunner(test, PRESETS[scheme], build=managed_by_software)
    finding = anyio.run(runner.explore, Plan())
    assert (finding.wrong, finding.objections, finding.cut) == ({}, [], False)
    assert finding.speculative == []
    assert finding.n_runs
