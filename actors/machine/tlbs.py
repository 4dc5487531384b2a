"""Who fills and follows a CPU's TLB below a monitor: the hardware, or the monitor itself.

The sub-VMM's consumer asks one of the two at the places where the texts name the TLB. Where the
hardware walks the shadow tables, a repaired instruction runs again (816) and what has changed is
dropped (876: INVLPG). Where software manages the TLB, the consumer writes the entry itself.

Source: A40 [0013], [0018], Fig. 8 step 816, Fig. 12 step 876; VTLB, "software-managed".
"""

from __future__ import annotations

from typing import Protocol

from penumbra.actors.machine.messages import Invalidate, Refill, Renew
from penumbra.actors.machine.observer import Observer
from penumbra.actors.machine.seat import Seat
from penumbra.hw.exits import Done


class TlbManagement(Protocol):
    """What a consumer asks about the TLB of its CPU."""

    def missed(self, gva: int, kind: int, user: bool) -> bool:
        """Answer a miss out of the shadow tables; False if they do not permit the access."""
        ...

    def filled(self, gva: int, kind: int, user: bool) -> None:
        """The shadow holds the translation of an access that is made again next (816)."""

    def changed(self, gvas: list[int]) -> None:
        """The shadow's translations of these addresses have changed (876)."""


class ManagedByHardware:
    """The hardware walks: the monitor only says what it must forget."""

    def __init__(self, vcpu_id: int, cpu: Seat, observer: Observer) -> None:
        self._vcpu = vcpu_id
        self._cpu = cpu
        self._observer = observer

    def missed(self, gva: int, kind: int, user: bool) -> bool:
        return False  # its own walk has just failed

    def filled(self, gva: int, kind: int, user: bool) -> None:
        pass  # 816: it walks when the instruction runs again

    def changed(self, gvas: list[int]) -> None:
        self._observer.count(self._vcpu, "invlpg", len(gvas))
        self._cpu.ask_nowait(Invalidate(tuple(gvas)))  # 876


class ManagedByMonitor:
    """The monitor writes every entry, as the shadow has it."""

    def __init__(self, vcpu_id: int, cpu: Seat, observer: Observer, *, update: bool) -> None:
        """Manage one CPU's TLB.

        Args:
            update: Bring cached entries in line with the shadow where they are; else drop them.
        """
        self._vcpu = vcpu_id
        self._cpu = cpu
        self._observer = observer
        self._update = update

    def missed(self, gva: int, kind: int, user: bool) -> bool:
        inserted = isinstance(self._cpu.ask_nowait(Refill(gva, kind, user)).exit, Done)
        if inserted:
            self._observer.count(self._vcpu, "tlb_refill")
        return inserted

    def filled(self, gva: int, kind: int, user: bool) -> None:
        self.missed(gva, kind, user)  # 816

    def changed(self, gvas: list[int]) -> None:
        if not self._update:
            self._observer.count(self._vcpu, "invlpg", len(gvas))
            self._cpu.ask_nowait(Invalidate(tuple(gvas)))
            return
        renewed = self._cpu.ask_nowait(Renew(tuple(gvas))).exit  # 876
        assert isinstance(renewed, Done)
        self._observer.count(self._vcpu, "tlb_update", renewed.value)
        self._observer.count(self._vcpu, "invlpg", len(gvas) - renewed.value)
