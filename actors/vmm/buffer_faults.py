"""Every way of getting the guest write buffer wrong that is worth showing.

The abstract is silent on most of what a machine with several CPUs needs; each switch is the form
that follows from reading it literally, or from forgetting one step. They combine with `+` in
`scheme.options.buffer.fault`.

Source: GWB; `docs/errata.md` EG1-EG7.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from types import MappingProxyType
from typing import Final, NamedTuple


class BufferFault(IntFlag):
    """Which steps are left out; `NONE` is the order that holds."""

    NONE = 0
    LOSS_IGNORED = 1 << 0
    OWN_BUFFER_ONLY = 1 << 1
    MARK_UNFLUSHED = 1 << 2
    ONE_ALIAS_MARKED = 1 << 3
    LOGGED_LATE = 1 << 4
    HARDWARE_DIRTY = 1 << 5
    DMA_UNTOLD = 1 << 6


class FaultRow(NamedTuple):
    """One row of the catalogue; `printed` is a form the text has, the rest are naive."""

    fault: BufferFault
    erratum: str
    printed: bool
    place: str
    line: str


# fmt: off
BUFFER_FAULTS: Final[Mapping[str, FaultRow]] = MappingProxyType({
    "loss_ignored": FaultRow(
        BufferFault.LOSS_IGNORED, "EG1", False, "vmm/write_buffer",
        "a full buffer drops records and nobody resynchronises",
    ),
    "own_buffer_only": FaultRow(
        BufferFault.OWN_BUFFER_ONLY, "EG2", True, "machine/coherence",
        "as printed, \"the guest write buffer\": an event reads that of its own CPU alone",
    ),
    "mark_unflushed": FaultRow(
        BufferFault.MARK_UNFLUSHED, "EG3", False, "vmm/detect",
        "the mark is set in the shadow entry while TLBs keep the unmarked one",
    ),
    "one_alias_marked": FaultRow(
        BufferFault.ONE_ALIAS_MARKED, "EG4", False, "vmm/detect",
        "one mapping of a guest table is marked and its aliases are not",
    ),
    "logged_late": FaultRow(
        BufferFault.LOGGED_LATE, "EG5", False, "hw/kernels",
        "the record comes after its store is visible to other CPUs",
    ),
    "hardware_dirty": FaultRow(
        BufferFault.HARDWARE_DIRTY, "EG6", False, "vmm/detect",
        "a marked entry lets the first store pass: D is set in the shadow, never in the guest",
    ),
    "dma_untold": FaultRow(
        BufferFault.DMA_UNTOLD, "EG7", False, "machine/disk",
        "a device's stores to a guest table pass no CPU's buffer and are told to nobody",
    ),
})
# fmt: on


def buffer_fault_named(names: str) -> BufferFault:
    """Return the faults for switch names joined by `+`; the empty text is none.

    Raises:
        ValueError: No such switch.
    """
    fault = BufferFault.NONE
    for name in filter(None, names.split("+")):
        if name not in BUFFER_FAULTS:
            raise ValueError(f"no write buffer fault {name!r}: see `penumbra list faults`")
        fault |= BUFFER_FAULTS[name].fault
    return fault
