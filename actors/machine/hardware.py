"""The physical machine: RAM and CPUs, below whoever runs on them.

Source: A40 Figs 1, 3, 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.cpu import CpuActor
from penumbra.actors.machine.seat import CpuRef
from penumbra.actors.runtime import ActorSystem
from penumbra.hw import mmu_layout as m
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.formats import FORMATS
from penumbra.hw.memory import Ram
from penumbra.hw.tlb import Tlb, TlbGeometry
from penumbra.hw.write_buffer import NO_BUFFER, BufferSpec

NOBODY = -1


class Hardware:
    """RAM and physical CPUs of one paging format.

    Attributes:
        owner: int16[n_frames]: number of the VM the kernel gave a frame to, or `NOBODY`.
    """

    def __init__(
        self,
        config: MachineConfig,
        n_frames: int,
        n_cpus: int,
        siblings: Sequence[Sequence[int]] = (),
        buffer: BufferSpec = NO_BUFFER,
    ) -> None:
        """Build what `config` says of TLBs and format.

        Args:
            buffer: Each CPU's guest write buffer.
            siblings: Groups of CPUs that share one TLB (A40 Fig. 4); none: groups of `config.smt`.
        """
        self.spec = spec = FORMATS[config.paging]
        self.ram = Ram(n_frames)
        self.owner: npt.NDArray[np.int16] = np.full(n_frames, NOBODY, np.int16)
        geometry = TlbGeometry(config.tlb_entries, config.tlb_ways, config.psc_slots)
        tlbs = [Tlb(spec, geometry) for _ in range(n_cpus)]
        smt = config.smt
        groups: Iterable[Sequence[int]] = siblings or [
            range(i, min(i + smt, n_cpus)) for i in range(0, n_cpus, smt)
        ]
        for group in groups:
            for i in group:
                tlbs[i] = tlbs[group[0]]
        self.cpus = [
            PhysicalCpu(i, spec, self.ram, tlb, buffer=buffer) for i, tlb in enumerate(tlbs)
        ]
        for cpu in self.cpus:
            cpu.reg[m.R_SPURIOUS] = int(config.spurious_faults)
            cpu.machine_checks = config.beyond_ram == "machine-check"
        software = config.tlb == "software"
        self._ports = [cpu.let_software_manage() if software else None for cpu in self.cpus]

    def spawn(self, system: ActorSystem, prefix: str = "") -> list[CpuRef]:
        """Start the task of each CPU."""
        return [
            system.spawn(CpuActor(cpu, ports), f"{prefix}cpu-{cpu.cpu_id}")
            for cpu, ports in zip(self.cpus, self._ports, strict=True)
        ]
