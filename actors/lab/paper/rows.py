"""The published ratios, row by row, and what is run for each: R1-R3 calibrated, R4-R10 predicted.

Nothing here is a result: a figure names the runs it needs and a formula over what they count.
Schemes are named; one that is not among the presets leaves its cells saying so.
"""

from __future__ import annotations

from collections.abc import Sequence

from penumbra.actors.lab.paper import figures as f
from penumbra.actors.lab.paper.calibration import HARDWARE, NATIVE, PUBLISHED, TRANSLATED, equations
from penumbra.actors.lab.paper.figures import CALIBRATED, NONE, PREDICTED, Figure
from penumbra.actors.lab.paper.runs import Measured, Run, same_page_share
from penumbra.actors.observe.events import EventKind
from penumbra.hw.costs import shipped_profiles

IMMEDIATE = "shootdown"  # the texts' name for: every traced store is brought in at once
_BT = "machine.control=translated"
_SYSTEMS = {"BT VMM": TRANSLATED, "HW VMM": HARDWARE}
_STORES = (int(EventKind.TRACED_STORE), int(EventKind.EMULATED_STORE))
_OTHERS = ("patch", "patch-shared", "vtlb", "vtlb-eager", "write-buffer", "out-of-sync", "nested")
PROGRAMS = (
    "system-calls", "compile-mix", "fork-wait", "page-fault", "pte-change", "process-switcher",
    "buffer-pool", "mmap-server",
)  # fmt: skip


def under(profile: str, workload: str, *settings: str, scheme: str = IMMEDIATE) -> Run:
    """Return a run on the system of a profile: bare, translated, or hardware-assisted."""
    if profile == NATIVE:
        return Run(workload, "native", NATIVE, 1, settings)
    mode = (_BT,) if profile == TRANSLATED else ()
    return Run(workload, scheme, profile, 1, (*mode, *settings))


def _price(system: str, row: str) -> f.Formula:
    def formula(_: Sequence[Measured]) -> float:
        (one,) = (equation for equation in equations(system) if equation.row == row)
        return shipped_profiles()[system].cost(one.counters)

    return formula


def calibrated() -> list[Figure]:
    """Return R1-R3: what the profiles were made from, given back by the profiles."""
    found = []
    for row, name in (("R1", "pgfault"), ("R2", "ptemod"), ("R3", "divzero")):
        for system, cycles in PUBLISHED[name].items():
            found.append(
                Figure(
                    row, f"{name}, {system}", f"{cycles:,}", "cycles", CALIBRATED, (),
                    _price(system, row), cycles, cycles,
                )
            )  # fmt: skip
    return found


def guest_os() -> list[Figure]:
    """Return R1 again, with a whole guest kernel behind the fault."""
    found = []
    for name, system, target in (("BT VMM", TRANSLATED, 3.6), ("HW VMM", HARDWARE, 10.3)):
        runs = tuple(
            under(profile, "page-fault", f"workload.pages={pages}")
            for profile in (system, NATIVE)
            for pages in (48, 24)
        )
        found.append(
            Figure(
                "R1", f"page-fault, {name} / native", f"{target} x", "x", PREDICTED, runs,
                f.marginal_ratio(4 * 24), target, target,
                "The handler is a kernel's demand-zero fault, not an empty one: it clears the page,"
                " and changes two entries on traced pages.",
            )
        )  # fmt: skip
    return found


def nanobenchmarks() -> list[Figure]:
    """Return R4."""

    def calls(system: str) -> tuple[Run, ...]:
        return tuple(
            under(profile, "system-calls", f"workload.calls={n}")
            for profile in (system, NATIVE)
            for n in (1500, 500)
        )

    ports = "The guest's operations have no port I/O; its disk is reached by DMA."
    return [
        Figure("R4", "syscall, BT VMM - native", "~2,000", "cycles", PREDICTED, calls(TRANSLATED),
               f.marginal_difference(1000), 2000, 2000,
               "Trap, call-outs for the interrupt flag and the return, translated kernel code."),
        Figure("R4", "syscall, HW VMM / native", "1 x", "x", PREDICTED, calls(HARDWARE),
               f.marginal_ratio(1000), 1, 1),
        Figure("R4", "in, BT VMM / native", "~0.07 x", "x", NONE, note=ports),
        Figure("R4", "in, HW VMM / native", "4.93 x", "x", NONE, note=ports),
        Figure("R4", "call+ret, BT VMM / native", "4.64 x", "x", NONE,
               note="Progress counts operations on memory, not calls within code."),
    ]  # fmt: skip


def fork_and_wait() -> list[Figure]:
    """Return R5, and the same for schemes of which nothing is published."""
    native = under(NATIVE, "fork-wait")
    light = (
        "Native fork+wait here is thousands of cycles, in the source 150 us: the guest kernel's own"
        " work is counted by its memory operations alone, so what monitors add weighs more."
    )
    found = [
        Figure("R5", f"forkwait, {name} / native", f"{target} x", "x", PREDICTED,
               (under(system, "fork-wait"), native), f.ratio, target, target, light)
        for (name, system), target in zip(_SYSTEMS.items(), (6.1, 17.7), strict=True)
    ]  # fmt: skip
    found.append(
        Figure("R5", "forkwait, HW VMM / BT VMM", "2.9 x", "x", PREDICTED,
               (under(HARDWARE, "fork-wait"), under(TRANSLATED, "fork-wait")), f.ratio, 2.88, 2.88,
               "Of the two monitors alone: what native work weighs does not enter.")
    )  # fmt: skip
    for scheme in _OTHERS:
        runs = (under(HARDWARE, "fork-wait", scheme=scheme), native)
        found.append(
            Figure("R5", f"forkwait, {scheme} / native", "-", "x", PREDICTED, runs, f.ratio)
        )
    return found


def out_of_sync() -> list[Figure]:
    """Return R6 and R7."""
    published = {
        1: {"ia32": 0.850, "pae": 0.746, "x86-64": 0.805},
        2: {"ia32": 0.882, "pae": 0.798, "x86-64": 0.927},
    }
    found = []
    for vcpus, cells in published.items():
        for paging, target in cells.items():
            runs = tuple(
                Run("compile-mix", scheme, HARDWARE, vcpus, (f"machine.paging={paging}",))
                for scheme in ("out-of-sync", IMMEDIATE)
            )
            found.append(
                Figure("R6", f"build, {vcpus} VCPU, {paging}: out-of-sync / emulate-all",
                       f"{target:.2f} x", "x", PREDICTED, runs, f.ratio, target, target)
            )  # fmt: skip
    smp = Run("compile-mix", IMMEDIATE, HARDWARE, 2, ("machine.paging=x86-64",))
    found.append(
        Figure("R7", "build, 2 VCPU, x86-64: emulated writes to the page of the last one", "0.89",
               "", PREDICTED, (smp,), lambda runs: same_page_share(runs[0].events(), _STORES),
               0.89, 0.89, "Rests on no price: counted in the events of the run.")
    )  # fmt: skip
    return found


def nested() -> list[Figure]:
    """Return R8, R9 and R10."""

    def pairs(*workloads: str) -> tuple[Run, ...]:
        return tuple(
            under(HARDWARE, workload, scheme=scheme)
            for workload in workloads
            for scheme in (IMMEDIATE, "nested")
        )

    cold = ("machine.psc_slots=0",)
    newer = "The source's processors exit in far fewer cycles than those R1-R3 were measured on."
    found = [
        Figure("R8", "MMU-heavy programs, shadow / nested, largest", "up to 1.48 x", "x", PREDICTED,
               pairs("compile-mix", "process-switcher", "mmap-server"), f.largest_ratio, 1, 1.48,
               newer),
        Figure("R8", "micro benchmarks, shadow / nested, largest", "up to 7 x", "x", PREDICTED,
               pairs("fork-wait", "page-fault", "pte-change"), f.largest_ratio, 1, 7, newer),
        Figure("R9", "programs without a gap between shadow and nested", "> 50 %", "share",
               PREDICTED, pairs(*PROGRAMS), f.share_without_gap, 50, 100,
               "Five percent counts as none. These workloads are made to change page tables;"
               " the source's programs mostly compute."),
        Figure("R9", "largest gap between shadow and nested", "34 %", "share", PREDICTED,
               pairs(*PROGRAMS), f.largest_gap_percent, 34, 34, newer),
    ]  # fmt: skip
    for name, scheme, published in (
        ("native", "native", 4), ("shadow", IMMEDIATE, 4), ("nested", "nested", 24),
    ):  # fmt: skip
        profile = NATIVE if scheme == "native" else HARDWARE
        run = Run("compile-mix", scheme, profile, 1, cold)
        found.append(
            Figure("R10", f"memory references per walk, {name}", f"{published}", "reads", PREDICTED,
                   (run,), f.reads_per_walk, published, published,
                   "Without paging-structure caches. Walks that end at an entry that is not"
                   " present are shorter.")
        )  # fmt: skip
    found.append(
        Figure("R10", "agile / best of shadow and nested", ">= 12 % better", "%", NONE,
               note="No scheme here changes from shadow to nested within one walk.")
    )  # fmt: skip
    return found
