"""The task actor of a physical CPU: orders in, what happened out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
# By class, because `isinstance` of a struct costs a call of its metaclass wherever it says no.
# Why an operation stopped in its middle, to be made again from there.
_RESTARTS = frozenset({PageFault, TlbMiss, BufferFull})
_SAYS_WHERE = _RESTARTS | {BudgetSpent}
_NO_PROGRESS = _RESTARTS | {Spinning}
_STRINGS = frozenset({Fill, Copy})


class CpuActor(Actor[CpuOrder, Ran]):
    """Runs what it is given on one `PhysicalCpu` and measures its progress."""

    def __init__(self, cpu: PhysicalCpu, ports: TlbPorts | None = None) -> None:
        """Take a CPU, and the ports of its TLB if software manages it."""
        self._cpu = cpu
        self._ports = ports
        self._orders: dict[type, Callable[[Any], Ran]] = {
            Execute: self._execute,
            Complete: self._complete,
            LoadRoot: self._load_root,
            SetModes: self._set_modes,
            Invalidate: self._invalidate,
            Refill: self._port,
            Renew: self._port,
        }

    def receive(self, message: CpuOrder) -> Ran:
        return self._orders[message.__class__](message)

    def _complete(self, message: Complete) -> Ran:
        done, at = self._cpu.complete(message.work, message.at, message.hpas)
        no_run = isinstance(done, GeneralProtection) and isinstance(message.work, Block)
        spent = 0 if no_run else self._step(message)
        return Ran(done or BudgetSpent(at), spent, at)

    def _load_root(self, message: LoadRoot) -> Ran:
        refused = self._cpu.load_root(message.hpa, message.top)
        return _OK if refused is None else Ran(refused, 0)

    def _invalidate(self, message: Invalidate) -> Ran:
        cpu = self._cpu
        if message.everything:
            cpu.flush_all()
        cpu.invlpg_all(message.gvas)
        return _OK

    def _set_modes(self, message: SetModes) -> Ran:
        cpu = self._cpu
        refused = cpu.set_modes(
            wp=message.wp, pse=message.pse, pge=message.pge, nxe=message.nxe, pg=message.pg,
            reload=message.reload,
        )  # fmt: skip
        if refused is not None:
            return Ran(refused, 0)
        cpu.set_smep(message.smep)
        if message.flush or (message.reload and cpu.spec.root_registers > 0):
            cpu.flush_all()
        return _OK

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
        kind = work.__class__
        if kind is Block:
            cpu.reg[m.R_PROGRESS] = 0
            cpu.reg[m.R_LIMIT] = message.budget
            stop: Any = cpu.run(work, message.user, at)
            spent = cpu.reg[m.R_PROGRESS]
        else:
            stop = cpu.run(work, message.user, at)
            spent = 1
            if kind in _STRINGS:
                assert isinstance(work, Fill | Copy)
                reached = stop.at if stop.__class__ in _RESTARTS else work.n_bytes
                spent = (reached - at) // 8
            elif kind is Mark or stop.__class__ in _NO_PROGRESS:
                spent = 0
        if stop.__class__ in _SAYS_WHERE:
            at = stop.at
        return Ran(stop, spent, at)
