"""Random machines under random schemes: coherent, isolated, with the memory of `native`.

Draws are numbered, so every run of this file makes the same ones, as many as there is time for. The
report of a failure is a configuration file: `penumbra run FILE` replays it. `just soak` goes on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import msgspec
import numpy as np
import pytest
from isolation import foreign_translations
from random_machines import drawn, refusal, token
from random_runs import Campaign, complaint, differs_from_native, run_case, smaller

from penumbra.actors.console.config import RunConfig, read_toml
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.several import build_rig
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.workload import named_workload
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import PAGE_SHIFT, P

SECONDS = 65.0
FIRST = 1


@pytest.mark.shows("C1", "C5", "S2", "V7", "H7", "H12", "G2", "G4", "G7")
def test_whatever_is_drawn_is_coherent_and_right_for_a_minute_and_more() -> None:
    campaign = Campaign(SECONDS)
    campaign.run(FIRST)
    assert not campaign.failures, campaign.report()
    assert campaign.n_runs >= 10


@pytest.mark.shows("S1", "S2")
def test_draws_reach_every_scheme_format_and_crossing() -> None:
    draws = [drawn(number) for number in range(FIRST, FIRST + 250)]
    assert {case.scheme.name for case in draws} == set(PRESETS)
    machines = [case.machine for case in draws]
    for field, wanted in (
        ("vcpus", {1, 2, 3, 4, 8, 16}),
        ("paging", {"ia32", "pae", "x86-64"}),
        ("tlb", {"hardware", "software"}),
        ("tlb_entries", {8, 16, 64, 512, 1536}),
        ("smt", {1, 2, 4}),
        ("vms", {1, 2, 3}),
        ("spurious_faults", {False, True}),
    ):
        assert {getattr(machine, field) for machine in machines} == wanted, field
    assert {case.scheme.options.capacity for case in draws} >= {1, 2, 3, 8, 64, 1024}
    crossed = {(case.scheme.name, case.machine.tlb) for case in draws}
    assert {(name, "software") for name in PRESETS if name != "nested"} < crossed


@pytest.mark.shows("C4", "S1")
def test_a_draw_is_the_same_each_time_and_its_file_is_read_as_that_draw(tmp_path: Path) -> None:
    for number in range(FIRST, FIRST + 20):
        case = drawn(number)
        assert drawn(number) == case
        assert refusal(case) is None
        path = tmp_path / f"{number}.toml"
        path.write_text(token(case))
        read = read_toml(path).decode()
        assert msgspec.structs.replace(read, scheme=case.scheme) == case
        assert msgspec.structs.replace(read.scheme, about="") == msgspec.structs.replace(
            case.scheme, about=""
        )


@pytest.mark.shows("C3", "C4")
def test_a_scheme_that_leaves_a_step_out_fails_and_is_made_smaller() -> None:
    options = msgspec.structs.replace(PRESETS["patch"].options, order="left_unmarked", flood=3)
    case = RunConfig(
        seed=1,
        machine=MachineConfig(quantum=500, tlb_entries=64, vcpus=3),
        scheme=msgspec.structs.replace(PRESETS["patch"], options=options),
        workload={"name": "shootdown-stress", "threads": 2, "rounds": 3, "pages": 2},
    )
    assert complaint(case)
    small = smaller(case, lambda one: complaint(one) is not None)
    assert complaint(small)
    assert small.scheme.options.order == "left_unmarked", "what it takes stays"
    assert small.scheme.options.flood == 0
    assert small.machine.tlb_entries == MachineConfig().tlb_entries
    assert small.machine.vcpus < case.machine.vcpus


@pytest.mark.shows("C5")
def test_memory_that_differs_from_native_is_a_complaint() -> None:
    case = msgspec.structs.replace(drawn(FIRST), scheme=PRESETS["patch"])
    outcome = run_case(case)
    other = msgspec.structs.replace(case, workload={"name": "fork-storm", "depth": 0})
    assert differs_from_native(other, outcome)
    assert differs_from_native(case, outcome) is None


@pytest.mark.shows("I11", "V7")
@pytest.mark.parametrize("scheme", [name for name in PRESETS if PRESETS[name].shadow != "none"])
def test_a_translation_to_another_vms_frame_is_found_though_nobody_uses_it(scheme: str) -> None:
    config = MachineConfig(vcpus=1, cpus=1, vms=2, slice=500)
    workload = named_workload("process-switcher", processes=2, regions=4, turns=1)
    rig = build_rig(config, PRESETS[scheme], workload, CostProfile(), 3)
    anyio.run(rig.run, None)
    assert foreign_translations(rig) == []
    hardware = getattr(rig.run, "__self__").hardware  # noqa: B009
    mine, other = (set(machine.memory.guest_of) for machine in rig.machines)
    table = next(pfn for pfn in np.flatnonzero(hardware.owner == 0).tolist() if pfn not in mine)
    hardware.ram.store((table << PAGE_SHIFT) + 64, 8, min(other) << PAGE_SHIFT | P)
    assert len(foreign_translations(rig)) == 1


@pytest.mark.shows("S1")
@pytest.mark.parametrize(
    ("minutes", "code", "said"),
    [("0.01", 0, " 0 failed"), ("0", 2, "0: a number of minutes"), ("now", 2, "now: a number")],
)
def test_soaking_takes_minutes_and_says_how_it_went(minutes: str, code: int, said: str) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"
    command = [sys.executable, "-P", str(script), minutes, "--first", str(FIRST)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr.splitlines()[-1]
