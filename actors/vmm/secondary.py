"""What a VCPU's producer and consumer ask of its secondary data: the contract of a shadow policy.

`SubVmm` (traced shadow tables) is one answer; a virtual TLB is another. The actors that drive them
know no scheme. Methods that a policy has no use for answer with nothing: no keys, no root.

Source: A40 Figs 8, 11, 12; VTLB Figs 5, 7-10.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

from penumbra.actors.vmm.contents import Translation
from penumbra.actors.vmm.fill import BringFrame, Forward, Outcome, PlaceTraces
from penumbra.actors.vmm.propagate import Key
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.exits import GeneralProtection

Owed: TypeAlias = list[tuple[Key, int]]


class SecondaryData(Protocol):
    """Everything derived from guest page tables for one VCPU. Nothing here waits."""

    vcpu_id: int
    registers: GuestRegisters

    # ---- faults -----------------------------------------------------------------------------

    def fault(self, gva: int, kind: int, user: bool) -> Outcome:
        """Answer a hardware page fault by the guest's own tables (Fig. 8; VTLB method 700)."""
        ...

    def guest_address(
        self, gva: int, kind: int, user: bool
    ) -> int | Forward | PlaceTraces | BringFrame:
        """Translate for an emulated access, A and D set as the hardware would; return a gpa."""
        ...

    # ---- stores to primary data (Fig. 11) ---------------------------------------------------

    def begin_store(self, parts: list[tuple[int, int]]) -> list[Key]:
        """Announce a store of (guest-physical address, bytes) parts; return the entries touched."""
        ...

    def finish_store(self, keys: list[Key]) -> Owed:
        """The store is visible: tell the consumers; return who is owed a shootdown of what."""
        ...

    def consumers(self, key: Key) -> int:
        """Return the bit set of those whom a change of one entry concerns."""
        ...

    def tell(self, key: Key, consumers: int) -> int:
        """Tell consumers of one entry again; return the bit set of those still owed."""
        ...

    def blockers(self, consumers: int) -> int:
        """Return who must drain before these have room again; 0 = they are shot down."""
        ...

    def end_store(self, keys: list[Key]) -> None:
        """All told and acknowledged."""

    def flooded(self, gfn: int, whole_page: bool) -> bool:
        """Note a store to a traced table; tell whether its trace and shadows should go."""
        ...

    # ---- coherency events of this VCPU (Fig. 12; VTLB Fig. 5) --------------------------------

    def event_all(self) -> None:
        """Bring everything up to date."""

    def event_invlpg(self, gva: int) -> None:
        """Bring up to date what INVLPG covers."""

    def event_fault(self, gva: int) -> None:
        """Bring up to date what a page fault delivered at `gva` covers."""

    def load_root(self, cr3: int) -> PlaceTraces | int | GeneralProtection:
        """Take a new CR3; return the machine address the hardware's CR3 is to hold.

        A load that the guest's CPU refuses changes nothing.
        """
        ...

    def load_mode(self, register: int, value: int) -> bool | GeneralProtection:
        """Take a new CR0 or CR4; tell whether the hardware's modes have to be set anew."""
        ...

    def privilege(self, user: bool) -> int | None:
        """The VCPU's privilege changed; return a new machine root for the hardware, or None."""
        ...

    # ---- asked by other CPUs ----------------------------------------------------------------

    def shoot_down(self, key: Key) -> None:
        """Invalidate whatever derives from one guest entry (844)."""

    def revoke_write(self, gfn: int) -> int:
        """A trace is being placed on `gfn`: take write permission away; return how many lost it."""
        ...

    def drop_table(self, gfn: int) -> None:
        """Forget everything derived from a guest table."""

    def stores_lost(self) -> int:
        """Stores to guest tables went unseen: tell all; return the bit set owed a `forget_all`."""
        ...

    def forget_all(self) -> None:
        """Forget everything derived from any guest table."""

    def forget_frame(self, gfn: int) -> None:
        """The machine frame behind a guest frame is about to be another, or none, or shared.

        Afterwards nothing derived maps the old one, and `take_flushes` names every address that a
        TLB may hold for it. What was derived *from* the frame, if it is a table, stays.
        """

    # ---- what the hardware has to be told ---------------------------------------------------

    def take_flushes(self) -> list[int]:
        """Return the addresses to flush since the last call; `[FLUSH_ALL]` is all of them."""
        ...

    def take_reload(self) -> int | None:
        """Return the root to load again if top entries that CPUs hold in registers have changed."""
        ...

    def take_remote(self) -> int:
        """Return the bit set of other VCPUs that have flushes to take now, before they run on."""
        ...

    def take_applied(self) -> int:
        """Return how many patches were applied since the last call."""
        ...

    def take_counts(self) -> dict[str, int]:
        """Return what else happened since the last call, by counter name."""
        ...

    def entries(self) -> list[Translation]:
        """Return the translations this VCPU's CPU finds in what is derived for it (V1)."""
        ...

    def check(self) -> None:
        """Assert the policy's invariants."""
