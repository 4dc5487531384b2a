"""The published ratios about TLB shootdowns of an operating system: R11-R15.

None of R1-R3 prices an interrupt between processors; `ipi` is the default's assumption, and time
spent waiting for an acknowledgement is guest progress. These rows show the shape, not the height.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from penumbra.actors.lab.paper import figures as f
from penumbra.actors.lab.paper.calibration import NATIVE
from penumbra.actors.lab.paper.figures import NONE, PREDICTED, Figure
from penumbra.actors.lab.paper.runs import Measured, Run

_FINE = "machine.quantum=200"  # siblings answer soon, not at the end of a long turn
_PRICE = "The price of an IPI is assumed, not calibrated."


def storm(scheme: str = "native", *settings: str, threads: int = 3, flush: str = "eager") -> Run:
    """Return the munmap storm on four CPUs."""
    given = (_FINE, f"machine.guest_flush={flush}", f"workload.threads={threads}", *settings)
    return Run("munmap-storm", scheme, NATIVE, 4, given)


def server(scheme: str = "native", flush: str = "eager") -> Run:
    """Return the server on four CPUs."""
    return Run("mmap-server", scheme, NATIVE, 4, (_FINE, f"machine.guest_flush={flush}"))


def _verdict(runs: Sequence[Measured]) -> str:
    (run,) = runs
    if run.coherent is None:
        return "unchecked"
    return "no stale use" if run.coherent else "stale use: refused by the checker"


def lazily() -> list[Figure]:
    """Return R11 and R12."""
    early = 'machine.guest_bugs=["early-acknowledge"]'
    hasty = Run("shootdown-stress", "native", NATIVE, 4, (_FINE, early), flawed=True)
    hasty_storm = replace(storm("native", early), flawed=True)
    lazy = (
        "The guest kernel's `lazy` flush against its `eager` one. A round is map, touch and unmap,"
        " the source's number is munmap alone. " + _PRICE
    )
    return [
        Figure("R11", "munmap, lazy / eager shootdown", "-70.8 %", "%", PREDICTED,
               (storm(flush="lazy"), storm()), f.change_percent, -70.8, -70.8, lazy),
        Figure("R11", "server throughput, lazy over eager", "+59.9 %", "%", PREDICTED,
               (server(), server(flush="lazy")), f.change_percent, 59.9, 59.9, _PRICE),
        Figure("R11", "server throughput, lazy over ABIS", "+37.9 %", "%", NONE,
               note="ABIS tracks sharing by access bits; no flush of the guest kernel does."),
        Figure("R12", "acknowledging before the flush", "unsafe if tables are freed", "verdict",
               PREDICTED, (hasty,), _verdict,
               note="The source's hazard is a speculative walk of a freed table by a CPU that has"
               " acknowledged; the hardware here does not speculate, and the handler touches no"
               " user memory before it has flushed."),
        Figure("R12", "munmap storm, early / late acknowledgement", "-10 .. -20 %", "%", PREDICTED,
               (hasty_storm, storm()), f.change_percent, -20, -10,
               "An INVLPG is one unit of progress, so little is saved. " + _PRICE),
        Figure("R12", "shootdown latency, other techniques", "-10 .. -20 %", "%", NONE,
               note="Flushing while others do is what the guest kernel does anyway; the rest saves"
               " cache-line transfers, which have no price here."),
    ]  # fmt: skip


def in_hardware() -> list[Figure]:
    """Return R13, R14 and R15."""
    native = "The same guest without interrupts for flushing (preset native-patch). " + _PRICE
    alone = (
        "The same thread without siblings: remote invalidation for nothing, the bound of any"
        " hardware broadcast. " + _PRICE
    )
    return [
        Figure("R13", "hardware coherence of nested translations, KVM", "up to +30 %", "%", NONE,
               note="No hardware here keeps translations coherent when the host moves frames."),
        Figure("R13", "hardware coherence of nested translations, Xen", "up to +33 %", "%", NONE,
               note="As above."),
        Figure("R14", "server, no shootdown interrupts / eager", "up to +28 %", "%", PREDICTED,
               (server(), server("native-patch")), f.change_percent, 0, 28, native),
        Figure("R14", "munmap storm, no shootdown interrupts / eager", "up to +92 %", "%",
               PREDICTED, (storm(), storm("native-patch")), f.change_percent, 0, 92, native),
        Figure("R15", "munmap storm, loops: no remote cost / IPIs", "2.2 x", "x", PREDICTED,
               (storm(), storm(threads=0)), f.ratio, 2.2, 2.2, alone),
        Figure("R15", "share of invalidation by IPIs", "40 %", "share", PREDICTED,
               (storm(), storm(threads=0)), f.invalidation_share, 40, 40, alone),
        Figure("R15", "share of invalidation left without IPIs", "4 %", "share", PREDICTED,
               (storm("native-patch"), storm(threads=0)), f.invalidation_share, 4, 4, native),
    ]  # fmt: skip
