"""What the actors of a machine tell each other: nouns for facts, verbs for orders."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from penumbra.hw.exits import Exit
from penumbra.hw.operations import Operation

# ---- conductor and VCPU ----------------------------------------------------------------


class Grant(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """The baton: run until progress `limit`, from no less than `since`."""

    since: int
    limit: int


class Baton(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """The VCPU gives the baton back; `ended` names a reason to end the whole machine."""

    progress: int
    ended: str = ""


# ---- VCPU and guest thread -------------------------------------------------------------


class Resume(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """The operation before is done; `value` is what it gave."""

    value: int | None


class EnterFault(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """A page fault is delivered; `retry` is what remains of the operation that faulted."""

    vcpu_id: int
    gva: int
    error: int
    retry: Operation
    interrupts: bool


class EnterInterrupt(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """An interrupt is delivered before `retry`, or after a finished HLT (None)."""

    vcpu_id: int
    vector: int
    retry: Operation | None
    interrupts: bool


class EnterCall(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """A system call is delivered."""

    vcpu_id: int
    name: str
    args: tuple[int, ...]
    interrupts: bool


class EnterProtection(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """A general-protection fault is delivered."""

    vcpu_id: int
    reason: str
    retry: Operation
    interrupts: bool


class Issued(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """The thread's next operation, in user or supervisor mode."""

    work: Operation
    user: bool


class Panicked(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """The guest kernel cannot go on."""

    reason: str


ThreadOrder: TypeAlias = Resume | EnterFault | EnterInterrupt | EnterCall | EnterProtection
ThreadReply: TypeAlias = Issued | Panicked

# ---- VCPU and physical CPU -------------------------------------------------------------


class Execute(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """Run `work` from `at` for at most `budget` progress (blocks only)."""

    work: Operation
    user: bool
    at: int
    budget: int


class Complete(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Carry out one step of `work` at machine addresses a monitor has worked out."""

    work: Operation
    user: bool
    at: int
    hpas: tuple[int, ...]


class LoadRoot(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """MOV CR3 with a machine address.

    `top`: what the registers of the top level held when this root was last in use, where the format
    has them; empty: they are loaded from memory.
    """

    hpa: int
    top: tuple[int, ...] = ()


class SetModes(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """Mode bits of the hardware's control registers; `flush` drops everything cached.

    `reload`: a change that loads the top level's registers, where the format has them.
    """

    wp: bool
    pse: bool
    pge: bool
    nxe: bool
    pg: bool
    flush: bool = True
    reload: bool = False
    smep: bool = False


class Invalidate(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """INVLPG of each address, or a full flush."""

    gvas: tuple[int, ...]
    everything: bool = False


class Refill(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """Write the TLB entry an access needs, out of the tables at the CPU's root, or say the fault.

    For a CPU whose TLB software manages, as `Renew`.
    """

    gva: int
    kind: int
    user: bool


class Renew(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """Bring cached entries in line with the tables at the CPU's root; the answer: how many."""

    gvas: tuple[int, ...]


class Ran(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """What became of an order: why it stopped, the progress it made, where it goes on."""

    exit: Exit
    spent: int
    at: int = 0


CpuOrder: TypeAlias = Execute | Complete | LoadRoot | SetModes | Invalidate | Refill | Renew

# ---- VCPU, producer and consumer -------------------------------------------------------


class EmulateStore(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """A permitted access that the hardware must not make: a store (Fig. 11 from 830), or any to a
    device.
    """

    work: Operation
    user: bool
    at: int


class Stored(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """The access is done and told; `drop` names the guest tables whose shadows should go."""

    ran: Ran
    drop: tuple[int, ...] = ()


class TruePageFault(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """The guest's own tables refuse the access."""

    gva: int
    error: int
    kind: int


class TracesWanted(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """These guest tables must be traced on every CPU first; then ask again."""

    gfns: tuple[int, ...]


class FrameWanted(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=30):
    """This guest frame must be in a machine frame first, its own if `write`; then ask again."""

    gfn: int
    write: bool


class Repaired(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """A hidden fault: the shadow holds the translation now. `remote`: see `Followed`."""

    remote: int = 0


class StoreWanted(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """The access is one the producer has to make: a store, or (`device`) any to a device."""

    device: bool = False


class DeviceStore(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """A device this VCPU set going writes `data` to a traced guest table, from `gpa` on."""

    gpa: int
    data: bytes


class DeviceStored(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """The device's stores are visible and every consumer concerned is told."""


class TellLogged(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """Read this VCPU's guest write buffer and tell the consumers what it holds."""


class LogTold(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """Every consumer concerned is told; these guest tables' shadows should go."""

    untrace: tuple[int, ...]


ProducerOrder: TypeAlias = EmulateStore | DeviceStore | TellLogged
ProducerReply: TypeAlias = (
    Stored | TruePageFault | TracesWanted | FrameWanted | DeviceStored | LogTold
)


# ---- the disk ------------------------------------------------------------------------------


class StartTransfer(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """A VCPU at `progress` wants one page moved; the reply's value is a ticket or 0."""

    vcpu_id: int
    block: int
    gpa: int
    to_disk: bool
    progress: int


class TakeFinished(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """A VCPU asks for a finished transfer of its own; the reply's value is a ticket or 0."""

    vcpu_id: int


class CarryOut(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Carry out all transfers due by `progress`; the reply's value is when the next one is due."""

    progress: int


class DiskReply(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """The disk's answer."""

    value: int


DiskOrder: TypeAlias = StartTransfer | TakeFinished | CarryOut


class Repair(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """The hardware faulted: Fig. 8."""

    gva: int
    kind: int
    user: bool


class PageInvalidated(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Coherency event: the guest executed INVLPG."""

    gva: int


class RootLoaded(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Coherency event: the guest loaded CR3."""

    cr3: int


class ModeLoaded(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """Coherency event: the guest loaded CR0 or CR4."""

    register: int
    value: int


class FaultDelivered(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """Coherency event: a page fault goes to the guest."""

    gva: int


class ShootDown(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """Another CPU's producer: invalidate what derives from one guest entry (844)."""

    base: int
    offset: int


class RevokeWrite(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """A trace is being placed: no mapping of this guest frame may stay writable (T3a)."""

    gfn: int


class DropTable(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """A guest table's trace is being removed: forget everything derived from it."""

    gfn: int


class ForgetFrame(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=31):
    """The machine frame behind a guest frame is about to change: no shadow, no TLB may map it."""

    gfn: int


class Missed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """The TLB, which software manages, has no answer; the reply is `Repaired` if the shadow has."""

    gva: int
    kind: int
    user: bool


class Followed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """The shadow follows, the CPU is flushed; so many patches were applied.

    Attributes:
        remote: Bit set of VCPUs that walk what was freed: they have to flush before they run on.
    """

    n_applied: int = 0
    remote: int = 0


class PrivilegeChanged(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=20):
    """The VCPU entered or left user mode (VTLB Fig. 5, 506)."""

    user: bool


class Refused(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """The guest's own CPU refuses to load this register: a general-protection fault."""

    reason: str


class ForgetAll(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=11):
    """Stores to guest tables were lost: drop everything derived."""


class TablesFreed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=12):
    """Another VCPU freed tables this one shares: flush (VTLB Fig. 8, 894)."""


class Drain(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=13):
    """Another CPU waits for room in a channel: take what is there now (A40 ¶128)."""


class MachineChecked(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=12):
    """The guest's tables name memory the VM does not have (VTLB Fig. 7A, 716)."""

    gva: int
    gpa: int


ConsumerOrder: TypeAlias = (
    Repair
    | TablesFreed
    | PageInvalidated
    | PrivilegeChanged
    | Drain
    | RootLoaded
    | ModeLoaded
    | FaultDelivered
    | ShootDown
    | RevokeWrite
    | DropTable
    | ForgetFrame
    | Missed
    | ForgetAll
)
ConsumerReply: TypeAlias = (
    Repaired
    | StoreWanted
    | TruePageFault
    | TracesWanted
    | FrameWanted
    | Followed
    | Refused
    | MachineChecked
)
