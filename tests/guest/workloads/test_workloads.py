"""The workloads on the flat machine: right data, nothing stale, everything given back."""

from __future__ import annotations

from typing import Any

import pytest

from penumbra.guest.kernel import KernelOptions
from penumbra.guest.programs.program import Program
from penumbra.guest.workloads import (
    WORKLOADS,
    BufferPool,
    CompileMix,
    ForkStorm,
    ForkWait,
    MmapChurn,
    MmapServer,
    MunmapStorm,
    PageFault,
    ProcessSwitcher,
    PteChange,
    ShootdownStress,
    SwapThrash,
    SystemCalls,
    make_workload,
)
from penumbra.hw.formats import FORMATS, IA32, X86_64, FormatSpec
from penumbra.hw.operations import Store
from tests.guest.flat_driver import FlatMachine

SMALL: list[Program] = [
    ForkStorm(pages=6, children=2, depth=2, rounds=2),
    MmapChurn(processes=3, steps=30, pages=40),
    ShootdownStress(threads=3, rounds=4, pages=40),
    BufferPool(workers=3, updates=10),
    ProcessSwitcher(processes=4, regions=5, turns=3),
    SwapThrash(processes=2, pages=20),
    ForkWait(rounds=3, pages=5),
    PageFault(rounds=2, pages=6),
    PteChange(rounds=2, pages=6),
    SystemCalls(calls=20),
    CompileMix(units=3, jobs=2, pages=6, passes=2),
    MunmapStorm(threads=2, rounds=6),
    MmapServer(workers=3, requests=4),
]


@pytest.mark.shows("G9")
@pytest.mark.parametrize(
    ("spec", "n_vcpus", "sticky"),
    [
        *((FORMATS[name], 3, False) for name in FORMATS),
        *((FORMATS[name], 4, True) for name in FORMATS),
        (FORMATS["ia32"], 1, True),
        (FORMATS["x86-64"], 2, True),
        (FORMATS["pae"], 8, True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("program", SMALL, ids=lambda program: program.name)
def test_a_workload_finds_no_wrong_value(
    spec: FormatSpec, n_vcpus: int, sticky: bool, program: Program
) -> None:
    options = KernelOptions(timer_period=900, flush_limit=8)
    machine = FlatMachine(spec, [program], n_vcpus, sticky=sticky, seed=n_vcpus, options=options)
    ended = machine.run(3_000_000), machine.wrong, machine.reasons, machine.stale
    assert ended == ("finished", [], [], [])
    machine.check_all_returned()


@pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))
def test_workloads_run_side_by_side(spec: FormatSpec) -> None:
    machine = FlatMachine(spec, SMALL, 4, sticky=True, options=KernelOptions(timer_period=300))
    assert (machine.run(5_000_000), machine.wrong, machine.stale) == ("finished", [], [])
    machine.check_all_returned()


def test_a_workload_stays_below_the_peak_it_names() -> None:
    for program in SMALL:
        machine = FlatMachine(X86_64, [program], 4)
        least = machine.kernel.frames.n_free
        frames = machine.kernel.frames

        def note(_: Any, frames: Any = frames) -> None:
            nonlocal least
            least = min(least, frames.n_free)

        machine.watch = note
        assert machine.run() == "finished"
        assert 0 < frames.n_frames - least <= program.peak_pages


def test_a_workload_notices_a_value_that_is_wrong() -> None:
    machine = FlatMachine(IA32, [ForkStorm(pages=2, children=1, depth=1)])
    spoiled = False

    def spoil(operation: Any) -> None:
        nonlocal spoiled
        if isinstance(operation, Store) and operation.gva == 0x2000_1000 + 40 and not spoiled:
            spoiled = True
            machine.ram[machine.layout.first_user_gfn << 12 :] = bytes(
                len(machine.ram) - (machine.layout.first_user_gfn << 12)
            )

    machine.watch = spoil
    machine.run()
    assert machine.wrong


def test_workloads_are_made_by_name_with_parameters() -> None:
    assert make_workload("fork-storm", pages=5) == ForkStorm(pages=5)
    assert [make_workload(name).name for name in WORKLOADS] == list(WORKLOADS)
    with pytest.raises(ValueError, match="no workload 'fork-strom'"):
        make_workload("fork-strom")
    with pytest.raises(ValueError, match="workload 'mmap-churn'"):
        make_workload("mmap-churn", threads=5)
