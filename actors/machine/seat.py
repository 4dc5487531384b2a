"""Where a VCPU finds its physical CPU: always the same one, or the one its world is seated on.

Whoever serves a VCPU asks its seat. While the world is on no CPU, what would change the CPU's root
or modes is kept for the next switch, and flushes are left out: a switch drops everything that was
cached.

Source: A40 ¶51, ¶54: the hardware state associated with a world.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import msgspec

from penumbra.actors.machine.messages import CpuOrder, Invalidate, LoadRoot, Ran, Renew, SetModes
from penumbra.actors.runtime import ActorRef
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import Done

CpuRef: TypeAlias = ActorRef[CpuOrder, Ran]
_KEPT = Ran(Done(), 0)


class Seat(Protocol):
    """What a VCPU and its sub-VMM see of a physical CPU."""

    ask_nowait: Callable[[CpuOrder], Ran]

    @property
    def cpu(self) -> PhysicalCpu:
        """The physical CPU itself, for what needs no order."""
        ...

    @property
    def seated(self) -> bool:
        """Whether the VCPU is on a physical CPU now."""
        ...


class FixedSeat:
    """One physical CPU for ever: the VCPU never leaves it."""

    def __init__(self, ref: CpuRef, cpu: PhysicalCpu) -> None:
        self.ask_nowait: Callable[[CpuOrder], Ran] = ref.ask_nowait
        self.cpu = cpu
        self.seated = True


class NotSeatedError(Exception):
    """A VCPU was run while its world was on no physical CPU."""


class WorldSeat:
    """The seat of a world that comes and goes.

    Invariant: while seated, the CPU's root and modes are those kept here.

    Args:
        spare: A CPU to answer questions that need no registers, while nobody is seated.
    """

    def __init__(self, spare: PhysicalCpu) -> None:
        self._spare = spare
        self._ref: CpuRef | None = None
        self._cpu: PhysicalCpu | None = None
        self._root: LoadRoot | None = None
        self._modes: SetModes | None = None
        self.ask_nowait: Callable[[CpuOrder], Ran] = self._ask

    @property
    def cpu(self) -> PhysicalCpu:
        return self._cpu or self._spare

    @property
    def seated(self) -> bool:
        return self._ref is not None

    def take(self, ref: CpuRef, cpu: PhysicalCpu) -> None:
        """Sit down: load this world's modes and root; nothing cached before stays."""
        self._ref, self._cpu = ref, cpu
        assert self._root is not None and self._modes is not None
        ref.ask_nowait(self._root)
        # What the last change of modes has loaded is among what the root restores.
        ref.ask_nowait(msgspec.structs.replace(self._modes, reload=False))
        ref.ask_nowait(Invalidate((), everything=True))

    def leave(self) -> None:
        """Get up; the CPU keeps stale state until the next world sits down."""
        assert self._cpu is not None and self._root is not None
        self._root = LoadRoot(self._root.hpa, self._cpu.top_entries)
        self._ref = self._cpu = None

    def _ask(self, order: CpuOrder) -> Ran:
        if isinstance(order, LoadRoot):
            self._root = order
        elif isinstance(order, SetModes):
            self._modes = order
        if self._ref is not None:
            return self._ref.ask_nowait(order)
        if isinstance(order, LoadRoot | SetModes | Invalidate | Renew):
            return _KEPT
        raise NotSeatedError(f"{type(order).__name__} for a world that is on no CPU")
