"""A virtual TLB: one VCPU's secondary data that needs no trace and no word from other VCPUs.

    method 400   guest hierarchy, active hierarchies derived from it, kept in step by events
    method 500   which event is it?
                   508 a change of privilege    510 user to supervisor or back?  512 the other root
                   514 a manipulation of the TLB                   516 the active entries follow
                   522 a page fault             524 the guest's own?  518 the guest's; 516 hidden

A store to a guest table makes nothing happen here: the active entries are then what a TLB's are
when memory has changed, and the guest has to flush them as it would flush a TLB. That is the whole
scheme. What it costs is that a CR3 load empties everything.

Source: VTLB Figs 3-6; VTLBc 1-30.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from penumbra.actors.vmm.contents import Translation, translations
from penumbra.actors.vmm.fill import BringFrame, Forward, Outcome, PlaceTraces
from penumbra.actors.vmm.propagate import Key
from penumbra.actors.vmm.secondary import Owed
from penumbra.actors.vmm.shadow import FLUSH_ALL
from penumbra.actors.vmm.top_registers import read_entries
from penumbra.actors.vmm.vtlb.build import Builder
from penumbra.actors.vmm.vtlb.conform import Conformer
from penumbra.actors.vmm.vtlb.eager import EagerFill
from penumbra.actors.vmm.vtlb.invalidate import InvalidateMethod
from penumbra.actors.vmm.vtlb.page_fault import Answer, PageFaultMethod
from penumbra.actors.vmm.vtlb.protect import protect
from penumbra.actors.vmm.vtlb.reading import GuestReader
from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.walk import registers_flush
from penumbra.hw.control import reloads_top
from penumbra.hw.exits import GeneralProtection
from penumbra.hw.formats import CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, PAGE_BYTES, PAGE_SHIFT


@dataclass(frozen=True)
class LevelChanged:
    """The guest goes to another privilege level, 0 to 3."""

    level: int


@dataclass(frozen=True)
class RootLoaded:
    """MOV to CR3."""

    cr3: int


@dataclass(frozen=True)
class TaskSwitched:
    """A task switch: CR3 and privilege level at once."""

    cr3: int
    level: int


@dataclass(frozen=True)
class PageInvalidated:
    """INVLPG."""

    gva: int


@dataclass(frozen=True)
class ModeLoaded:
    """MOV to CR0 or CR4."""

    register: int
    value: int


@dataclass(frozen=True)
class PageFaulted:
    """The hardware faulted on an access of this kind and privilege."""

    gva: int
    kind: int
    user: bool


@dataclass(frozen=True)
class OtherEvent:
    """Anything else that came to the monitor."""


Event: TypeAlias = (
    LevelChanged
    | RootLoaded
    | TaskSwitched
    | PageInvalidated
    | ModeLoaded
    | PageFaulted
    | OtherEvent
)


class VirtualTlb:
    """One VCPU's virtual TLB: its active hierarchies and what becomes of them at each event.

    Invariant: what the active hierarchies of this VCPU hold, a TLB of its could hold.

    Attributes:
        n_filled: Events after which everything was evaluated anew (method 1000).
    """

    def __init__(self, state: State) -> None:
        self.vcpu_id = state.vcpu_id
        self.state = state
        self.registers = state.registers
        self.n_filled = 0
        self._loaded = -1  # what the hardware's CR3 holds, or is about to
        self._held: list[int] = []  # and its registers of the top level, in formats that have them
        builder = Builder(state)
        self._reader = GuestReader(state)
        self._page_fault = PageFaultMethod(state, self._reader, builder)
        self._invalidate = InvalidateMethod(state)
        self._eager = EagerFill(state, builder)
        self.conformer = Conformer(state)

    # ---- method 500 -----------------------------------------------------------------------------

    def handle(self, event: Event) -> Answer | GeneralProtection | None:
        """Evaluate an event and do what it asks for (504, 506).

        Only a fault has an answer, and a load of a register that the guest's CPU refuses: that
        changed nothing.
        """
        if isinstance(event, TaskSwitched) and not self.state.printed("ET11"):
            refused = self._manipulated(RootLoaded(event.cr3))  # first: then a hierarchy is chosen
            if refused is not None:
                return refused
        if isinstance(event, LevelChanged | TaskSwitched):  # 508
            sensitive = self.state.is_user(event.level) != self.state.user  # 510
            self.state.level = event.level
            if sensitive or isinstance(event, TaskSwitched):
                self._loaded = self.root  # 512
        elif isinstance(event, RootLoaded | PageInvalidated | ModeLoaded):  # 514
            return self._manipulated(event)  # 516
        elif isinstance(event, PageFaulted):  # 522
            return self._page_fault.answer(event.gva, event.kind, event.user)  # 524, 518, 516
        return None

    @property
    def root(self) -> int:
        """Machine address of the hierarchy of the present privilege: what CR3 is to hold."""
        return self.state.pair.of(self.state.user).address

    def _manipulated(
        self, event: RootLoaded | PageInvalidated | ModeLoaded
    ) -> GeneralProtection | None:
        """Make the active entries follow the guest's TLB manipulation (516), if it is allowed."""
        state, refused = self.state, self._load_top(event)
        if refused is not None:
            return refused
        if isinstance(event, RootLoaded):
            state.registers.cr3 = event.cr3
            state.join()
            if state.options.working_set:
                self.conformer.conform()
                state.flushes.append(FLUSH_ALL)
            else:
                state.empty()
        elif isinstance(event, ModeLoaded):
            self._load_mode(event)
        elif state.options.drop == "all":
            state.empty()
            state.flushes.append(event.gva)
        else:
            self._invalidate.page(event.gva)
        if state.options.fill == "eager":
            self._eager.fill()
            self.n_filled += 1
        return None

    def _load_mode(self, event: ModeLoaded) -> None:
        state, registers = self.state, self.state.registers
        wp, pge = registers.cr0 & CR0_WP, registers.cr4 & CR4_PGE
        reloads = self._loads_top(event)
        flush = registers_flush(registers, event.register, event.value) or reloads
        if state.printed("ET12") and (registers.cr4 ^ pge) & CR4_PGE:
            flush = False
        pair = state.pair
        state.join()
        if flush or pair is not state.pair:
            state.empty()
        elif registers.cr0 & CR0_WP and not wp:  # 952
            protect(state)

    # ---- a top level in registers ----------------------------------------------------------------

    def _loads_top(self, event: RootLoaded | PageInvalidated | ModeLoaded) -> bool:
        """Tell whether the guest's CPU loads registers of the top level."""
        registers = self.registers
        if not self.state.spec.root_registers or isinstance(event, PageInvalidated):
            return False
        if isinstance(event, RootLoaded):
            return registers.paging
        return reloads_top(registers.cr0, registers.cr4, event.register, event.value)

    def _load_top(
        self, event: RootLoaded | PageInvalidated | ModeLoaded
    ) -> GeneralProtection | None:
        """Load what the guest's CPU holds in registers; return why it refuses, if it does."""
        if not self._loads_top(event):
            return None
        cr3 = event.cr3 if isinstance(event, RootLoaded) else self.registers.cr3
        entries = read_entries(self.state.spec, self.state.memory, cr3)
        if isinstance(entries, GeneralProtection):
            return entries
        self.registers.top = entries
        return None

    def _hold(self) -> None:
        """Note what the hardware's CR3, and its registers, hold from now on."""
        self._loaded, self._held = self.root, self._top_of_root()

    def _top_of_root(self) -> list[int]:
        """Return the active entries that the CPU holds in registers while it is on this root."""
        h = self.state.pair.of(self.state.user)
        return [h.entry(h.root, index) for index in range(self.state.spec.root_registers)]

    # ---- secondary data of a VCPU: faults and events --------------------------------------------

    def fault(self, gva: int, kind: int, user: bool) -> Outcome:
        """Answer a hardware page fault (method 700)."""
        answer = self.handle(PageFaulted(gva, kind, user))
        assert answer is not None and not isinstance(answer, GeneralProtection)
        return answer

    def guest_address(
        self, gva: int, kind: int, user: bool
    ) -> int | Forward | PlaceTraces | BringFrame:
        """Translate for an emulated access, A and D set as the hardware would; return a gpa."""
        reading = self._reader.read(self.state.pair.of(user), gva, kind, user)
        if reading.unready is not None:
            return BringFrame(reading.unready, True)
        if reading.error is not None:
            return Forward(reading.error)
        self._reader.mark(reading, kind, 0)
        return (reading.gfn << PAGE_SHIFT) | (gva & (PAGE_BYTES - 1))

    def event_all(self) -> None:
        """Bring everything up to date: drop it."""
        self.state.empty()

    def event_invlpg(self, gva: int) -> None:
        """INVLPG (method 880)."""
        self.handle(PageInvalidated(gva))

    def event_fault(self, gva: int) -> None:
        """A page fault delivered at `gva` drops what a TLB holds for it (printed: nothing, ET5)."""
        if not self.state.printed("ET5"):
            self._invalidate.page(gva)

    def load_root(self, cr3: int) -> PlaceTraces | int | GeneralProtection:
        """Take a new CR3: everything is dropped; return the machine root of the present level."""
        refused = self.handle(RootLoaded(cr3))
        if isinstance(refused, GeneralProtection):
            return refused
        self._hold()
        return self.root

    def load_mode(self, register: int, value: int) -> bool | GeneralProtection:
        """Take a new CR0 or CR4 (method 950 for CR0.WP); tell whether the hardware's modes change.

        They do with paging, PSE, PAE and PGE. After a change of mode the root may be another: ask
        `privilege`.
        """
        registers = self.registers
        before = (registers.cr0 & CR0_PG, registers.cr4 & (CR4_PSE | CR4_PAE | CR4_PGE))
        refused = self.handle(ModeLoaded(register, value))
        if isinstance(refused, GeneralProtection):
            return refused
        return before != (registers.cr0 & CR0_PG, registers.cr4 & (CR4_PSE | CR4_PAE | CR4_PGE))

    def privilege(self, user: bool) -> int | None:
        """The VCPU entered or left user mode; return the root to load if it is another (512)."""
        before = self._loaded
        self.handle(LevelChanged(3 if user else 0))
        if self.root == before:  # in another mode the pair may be another, too
            return None
        self._hold()
        return self.root

    # ---- stores to guest tables, other VCPUs: nothing to do -------------------------------------

    def begin_store(self, parts: list[tuple[int, int]]) -> list[Key]:
        """No guest table is traced."""
        return []

    def finish_store(self, keys: list[Key]) -> Owed:
        """Nobody is told."""
        return []

    def consumers(self, key: Key) -> int:
        """No change concerns anybody before his own event."""
        return 0

    def tell(self, key: Key, consumers: int) -> int:
        """There are no channels to tell anybody by."""
        return 0

    def blockers(self, consumers: int) -> int:
        """Nobody waits for room in a channel."""
        return 0

    def end_store(self, keys: list[Key]) -> None:
        pass

    def flooded(self, gfn: int, whole_page: bool) -> bool:
        return False

    def shoot_down(self, key: Key) -> None:
        pass

    def revoke_write(self, gfn: int) -> int:
        """Nothing is traced."""
        return 0

    def drop_table(self, gfn: int) -> None:
        pass

    def forget_frame(self, gfn: int) -> None:
        """Drop every active entry that maps the machine frame, of kept pairs, too."""
        self.state.forget_frame(gfn)

    def stores_lost(self) -> int:
        """No store is followed, so none can be lost."""
        return 0

    def forget_all(self) -> None:
        """Drop whatever is derived."""
        self.state.empty()

    # ---- what the hardware has to be told -------------------------------------------------------

    def take_flushes(self) -> list[int]:
        """Return the addresses to flush since the last call; `[FLUSH_ALL]` is all of them."""
        state, storage = self.state, self.state.pairs.storage
        wanted = dict.fromkeys(state.flushes)
        state.flushes.clear()
        if FLUSH_ALL in wanted or storage.owing >> self.vcpu_id & 1:
            storage.flushed(self.vcpu_id)
            return [FLUSH_ALL]
        return list(wanted)

    def take_remote(self) -> int:
        """Return the bit set of other VCPUs whose CPUs must flush before they run on."""
        return self.state.pairs.storage.owing & ~(1 << self.vcpu_id)

    def take_reload(self) -> int | None:
        """Return the root to load again if its top entries, held in registers, have changed."""
        if not self.state.spec.root_registers or not self.state.has_root:
            return None
        if self._loaded == self.root and self._held == self._top_of_root():
            return None
        self._hold()
        return self.root

    def take_counts(self) -> dict[str, int]:
        return {}

    def take_applied(self) -> int:
        return 0

    def entries(self) -> list[Translation]:
        """Return the content of the virtual TLB this VCPU runs on: the user's, the supervisor's."""
        state = self.state
        user, supervisor = (
            translations(
                state.spec, state.memory.ram, h.address, "user" if h.user else "supervisor"
            )
            for h in state.pair.both
        )
        return user + supervisor

    def check(self) -> None:
        """Assert that the tables are what the books say, and no access can bypass its privilege."""
        self.state.pairs.check()
        assert not (self.state.user and self.root == self.state.pair.supervisor.address)
