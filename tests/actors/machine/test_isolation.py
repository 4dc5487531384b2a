"""A guest that reaches its monitor's frames is found out. Other VMs' frames: `test_host.py`."""

from __future__ import annotations

import anyio
import pytest
from machines import SMALL_STRESS

from penumbra.actors.machine.build import build_machine
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.kernel import Kernel
from penumbra.hw.costs import CostProfile


@pytest.mark.shows("V7", "C2")
@pytest.mark.parametrize("scheme", ["patch", "shootdown", "write-buffer"])
def test_a_translation_that_leads_to_a_frame_of_the_monitors_is_refused(scheme: str) -> None:
    machine, oracle = build_machine(
        MachineConfig(vcpus=1, max_progress=20_000), PRESETS[scheme], SMALL_STRESS,
        CostProfile(), 1,
    )  # fmt: skip
    assert oracle is not None
    memory, kernel = machine.memory, machine.guest
    assert isinstance(kernel, Kernel)
    monitors = memory.take_frame()
    users = range(kernel.layout.first_user_gfn, memory.n_guest_frames)
    assert monitors not in memory.guest_of
    memory.frame_map[users] = monitors
    anyio.run(machine.run)
    verdict = oracle.verdict()
    assert not verdict.coherent
    first = verdict.violations[0].explain()
    assert "the frame is none of the allowed ones" in first
    assert f"used: machine frame {monitors:#x}" in first
