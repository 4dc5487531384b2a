"""No VM holds a translation to a frame not its own: every table its monitor keeps, read raw.

The kernel holds each frame that an access uses against who owns it, so what the hardware has filled
is covered; this looks at what the monitors have derived and no access has used yet.
"""

from __future__ import annotations

import numpy as np

from penumbra.actors.machine.hardware import Hardware
from penumbra.actors.machine.host import Host
from penumbra.actors.machine.machine import Machine
from penumbra.actors.machine.several import Rig
from penumbra.hw.formats import PAGE_SHIFT, P


def foreign_translations(rig: Rig) -> list[str]:
    """Return the entries of monitors' tables that lead to frames of another VM.

    A frame beyond RAM is nobody's: it stands for addresses where there is no memory.
    """
    host = getattr(rig.run, "__self__", None)
    if not isinstance(host, Host) or host.hardware is None:
        return []
    hardware = host.hardware
    return [
        f"VM {vm}: table {table:#x} leads to frame {pfn:#x} of VM {hardware.owner[pfn]}"
        for vm, machine in enumerate(host.machines)
        for table, pfn in (_listed if machine.config.frames_move else _foreign)(
            hardware, vm, machine
        )
    ]


def _listed(hardware: Hardware, vm: int, machine: Machine) -> list[tuple[int, int]]:
    """Look at what is listed: where frames change hands, free ones still hold what they held."""
    owner = hardware.owner
    listed = [(one.gva, one.pfn) for submm in machine.submms for one in submm.entries()]
    if machine.second_level is not None:
        listed = machine.second_level.leaves()
    return [(at, pfn) for at, pfn in listed if pfn < len(owner) and owner[pfn] != vm]


def _foreign(hardware: Hardware, vm: int, machine: Machine) -> list[tuple[int, int]]:
    """Look through every frame of the VM that is not the guest's, in use or not."""
    guests, nested = machine.memory.guest_of, machine.scheme.shadow == "nested"
    owner, spec = hardware.owner, hardware.spec
    tables = [pfn for pfn in np.flatnonzero(owner == vm).tolist() if pfn not in guests]
    wide = nested or spec.entry_bytes == 8
    words = hardware.ram.array64 if wide else hardware.ram.array32
    mask = (1 << 52) - 1 if wide else (1 << 32) - 1
    tables_of_ram = words.reshape(-1, (1 << PAGE_SHIFT) // words.itemsize)
    used = [table for table in tables if tables_of_ram[table].any()]
    entries = tables_of_ram[used]
    pfns = (entries & mask).astype(np.int64) >> PAGE_SHIFT
    inside = ((entries & P) != 0) & (pfns < len(owner))
    foreign = inside & (owner[np.where(inside, pfns, tables[0])] != vm)
    return [(used[row], int(pfns[row, column])) for row, column in np.argwhere(foreign).tolist()]
