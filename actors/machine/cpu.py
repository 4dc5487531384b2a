"""The task actor of a physical CPU: orders in, what happened out."""

from __future__ import annotations

from penumbra.actors.machine.messages import (
    Complete,
    CpuOrder,
    Execute,
    Invalidate,
    LoadRoot,
    Ran,
    Refill,
    Renew,
    SetModes,
)
from penumbra.actors.runtime import Actor
from penumbra.hw import mmu_layout as m
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import (
    BudgetSpent,
    BufferFull,
    Done,
    GeneralProtection,
    PageFault,
    Spinning,
    TlbMiss,
)
from penumbra.hw.operations import Block, Copy, Fill, Mark
from penumbra.hw.ports import TlbPorts

_OK = Ran(Done(), 0)
# Why an operation stopped in its middle, to be made again from there.
_RESTARTS = PageFault | TlbMiss | BufferFull


class CpuActor(Actor[CpuOrder, Ran]):
    """Runs what it is given on one `PhysicalCpu` and measures its progress."""

    def __init__(self, cpu: PhysicalCpu, ports: TlbPorts | None = None) -> None:
        """Take a CPU, and the ports of its TLB if software manages it."""
        self._cpu = cpu
        self._ports = ports

    def receive(self, message: CpuOrder) -> Ran:
        if isinstance(message, Execute):
            return self._execute(message)
        cpu = self._cpu
        if isinstance(message, Complete):
            done, at = cpu.complete(message.work, message.at, message.hpas)
            no_run = isinstance(done, GeneralProtection) and isinstance(message.work, Block)
            spent = 0 if no_run else self._step(message)
            return Ran(done or BudgetSpent(at), spent, at)
        if isinstance(message, Refill | Renew):
            return self._port(message)
        refused = None
        if isinstance(message, LoadRoot):
            refused = cpu.load_root(message.hpa)
        elif isinstance(message, Invalidate):
            if message.everything:
                cpu.flush_all()
            for gva in message.gvas:
                cpu.invlpg(gva)
        elif isinstance(message, SetModes):
            refused = cpu.set_modes(
                wp=message.wp, pse=message.pse, pge=message.pge, nxe=message.nxe, pg=message.pg,
                reload=message.reload,
            )  # fmt: skip
            if refused is None:
                cpu.set_smep(message.smep)
            reloaded = message.reload and cpu.spec.root_registers > 0
            if refused is None and (message.flush or reloaded):
                cpu.flush_all()
        return _OK if refused is None else Ran(refused, 0)

    def _port(self, message: Refill | Renew) -> Ran:
        assert self._ports is not None, "the hardware manages this TLB"
        if isinstance(message, Renew):
            return Ran(Done(sum(map(self._ports.renew, message.gvas))), 0)
        return Ran(self._ports.refill(message.gva, message.kind, message.user) or Done(), 0)

    def _step(self, message: Complete) -> int:
        """Progress of one emulated step: a run's references, or one."""
        if isinstance(message.work, Block):
            at = max(message.at, message.work.start)
            return int(self._cpu.streams[message.work.stream].runs[at] >> 14) & m.MAX_RUN_COUNT
        return 1

    def _execute(self, message: Execute) -> Ran:
        cpu, work, at = self._cpu, message.work, message.at
        if isinstance(work, Block):
            cpu.reg[m.R_PROGRESS] = 0
            cpu.reg[m.R_LIMIT] = message.budget
            stop = cpu.run(work, message.user, at)
            spent = cpu.reg[m.R_PROGRESS]
        else:
            stop = cpu.run(work, message.user, at)
            spent = 1
            if isinstance(work, Fill | Copy):
                reached = stop.at if isinstance(stop, _RESTARTS) else work.n_bytes
                spent = (reached - at) // 8
            elif isinstance(stop, _RESTARTS | Spinning) or isinstance(work, Mark):
                spent = 0
        if isinstance(stop, _RESTARTS | BudgetSpent):
            at = stop.at
        return Ran(stop, spent, at)
