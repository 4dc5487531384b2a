"""The instructions a guest can execute, as messages.

Guest programs and the guest kernel are coroutines. `await Load(gva, 8)` suspends the coroutine and
hands the operation to whoever drives it; what the hardware answers is the value of the `await`.
Operations are msgspec structs because they cross actors: they hold plain integers and text only.

Addresses are guest-virtual byte addresses. Values are unsigned; `size` is 1, 2, 4 or 8 bytes.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeAlias

import msgspec


class _Operation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    def __await__(self) -> Generator[_Operation, Any, Any]:
        return (yield self)


class Load(_Operation, frozen=True, array_like=True, gc=False, tag=1):
    """Read memory; the await's value is the unsigned integer read."""

    gva: int
    size: int


class Store(_Operation, frozen=True, array_like=True, gc=False, tag=2):
    """Write `value` (unsigned, fits `size`) to memory."""

    gva: int
    size: int
    value: int


class Exchange(_Operation, frozen=True, array_like=True, gc=False, tag=3):
    """Locked exchange; the await's value is what was there before. Always a write access."""

    gva: int
    size: int
    value: int


class CompareExchange(_Operation, frozen=True, array_like=True, gc=False, tag=4):
    """Locked compare-and-exchange; the await's value is what was there before.

    Stores `value` only if memory held `expected`. Always a write access.
    """

    gva: int
    size: int
    expected: int
    value: int


class Fill(_Operation, frozen=True, array_like=True, gc=False, tag=5):
    """Store a 64-bit `value` repeatedly (REP STOS): `gva` and `n_bytes` multiples of 8.

    Goes page by page through the MMU and restarts after a fault where it stopped.
    """

    gva: int
    n_bytes: int
    value: int


class Copy(_Operation, frozen=True, array_like=True, gc=False, tag=6):
    """Copy `n_bytes` upwards (REP MOVS): addresses and `n_bytes` multiples of 8; restartable."""

    dst: int
    src: int
    n_bytes: int


class Block(_Operation, frozen=True, array_like=True, gc=False, tag=7):
    """Execute the runs `start` to `stop` (exclusive) of an access stream known to the machine.

    A stream is one recorded process's page runs (`penumbra.hw.streams.AccessStream`). A fault or an
    interrupt stops between runs; the block resumes where it stopped.
    """

    stream: int
    start: int
    stop: int


class Invlpg(_Operation, frozen=True, array_like=True, gc=False, tag=8):
    """INVLPG: supervisor only."""

    gva: int


class LoadControl(_Operation, frozen=True, array_like=True, gc=False, tag=9):
    """MOV CRn, value; `register` is 0, 3 or 4. Supervisor only."""

    register: int
    value: int


class ReadControl(_Operation, frozen=True, array_like=True, gc=False, tag=10):
    """MOV value, CRn; `register` is 0, 2, 3 or 4. The guest sees its own virtual value."""

    register: int


class SendIpi(_Operation, frozen=True, array_like=True, gc=False, tag=11):
    """Send interrupt `vector` to every VCPU whose bit is set in `targets`. Supervisor only."""

    targets: int
    vector: int


class Halt(_Operation, frozen=True, array_like=True, gc=False, tag=12):
    """HLT: wait for an interrupt. With interrupts disabled and nothing pending the VCPU is dead."""


class SetInterrupts(_Operation, frozen=True, array_like=True, gc=False, tag=13):
    """STI or CLI; the await's value is 1 if interrupts were enabled before, else 0."""

    enabled: bool


class SpinUntil(_Operation, frozen=True, array_like=True, gc=False, tag=14):
    """Load again and again until `loaded & mask == value`; interrupts are taken meanwhile."""

    gva: int
    size: int
    mask: int
    value: int


class ArmTimer(_Operation, frozen=True, array_like=True, gc=False, tag=15):
    """Raise the timer interrupt on this VCPU once, after so much progress; 0 disarms."""

    after: int


class Syscall(_Operation, frozen=True, array_like=True, gc=False, tag=16):
    """Trap from user to kernel mode; the await's value is the kernel's result (int, may be < 0)."""

    name: str
    args: tuple[int, ...] = ()


class TrapReturn(_Operation, frozen=True, array_like=True, gc=False, tag=17):
    """IRET/SYSRET: emitted by the thread itself when a kernel coroutine has ended."""

    to_user: bool
    interrupts: bool


class SwitchThread(_Operation, frozen=True, array_like=True, gc=False, tag=18):
    """Continue with another thread on this VCPU; this one goes on when somebody switches back.

    The kernel's stack switch: registers only, CR3 is loaded separately. Supervisor only.
    """

    thread: int


class Mark(_Operation, frozen=True, array_like=True, gc=False, tag=19):
    """Tell observers something (a magic instruction): no architectural effect, no progress."""

    what: str
    args: tuple[int, ...] = ()
    text: str = ""


class XorMemory(_Operation, frozen=True, array_like=True, gc=False, tag=20):
    """Read-modify-write, `XOR [mem], value`; the await's value is what was there before.

    Always a write access, locked or not: a fault of the read half has W/R = 1.
    """

    gva: int
    size: int
    value: int


class StartDma(_Operation, frozen=True, array_like=True, gc=False, tag=21):
    """Let the disk's DMA controller move one page; supervisor only.

    `gpa` is a guest-physical page address, `block` one of the disk. The await's value is a ticket
    (> 0), or 0 if the controller refuses. The transfer reads or writes memory some progress later
    and then raises the disk's interrupt on this VCPU; what is in the page until then is undefined.
    """

    block: int
    gpa: int
    to_disk: bool


class FinishedDma(_Operation, frozen=True, array_like=True, gc=False, tag=22):
    """Read the controller's status; supervisor only.

    The await's value is the oldest ticket of this VCPU that is finished and was not returned
    before, 0 if there is none.
    """


class MappingChanged(_Operation, frozen=True, array_like=True, gc=False, tag=40):
    """Say that `n_pages` pages from `gva` on are mapped otherwise under the tables at `root`.

    Supervisor only. The await's value is the set of those of `cpus` (a bit each) on which whatever
    is cached of these pages will be dropped at their own next INVLPG or CR3 load; the others have
    to be interrupted. Where nothing carries such news it is 0.

    Source: A40 ¶59, ¶126.
    """

    cpus: int
    root: int
    gva: int
    n_pages: int


class ReleaseFrame(_Operation, frozen=True, array_like=True, gc=False, tag=41):
    """Say that the page at a guest-physical address is of no use: it holds zeros from now on.

    Supervisor only. Whatever is below the guest may use the memory until the page is touched again.
    The await's value is 1, or 0 where the address is no RAM's.
    """

    gpa: int


class LoadPhysical(_Operation, frozen=True, array_like=True, gc=False, tag=30):
    """Read at a guest-physical address, as through an identity mapping the TLB holds.

    Supervisor only; must not cross a page. The value of the await is what was read.
    """

    gpa: int
    size: int


class StorePhysical(_Operation, frozen=True, array_like=True, gc=False, tag=31):
    """Write at a guest-physical address, as through an identity mapping the TLB holds.

    Supervisor only; must not cross a page. A monitor sees it as any store: what is traced exits.
    """

    gpa: int
    size: int
    value: int


class ExchangePhysical(_Operation, frozen=True, array_like=True, gc=False, tag=32):
    """Locked exchange at a guest-physical address; otherwise as `StorePhysical`."""

    gpa: int
    size: int
    value: int


Physical: TypeAlias = LoadPhysical | StorePhysical | ExchangePhysical

Operation: TypeAlias = (
    Load
    | Store
    | Exchange
    | CompareExchange
    | Fill
    | Copy
    | Block
    | Invlpg
    | LoadControl
    | ReadControl
    | SendIpi
    | Halt
    | SetInterrupts
    | SpinUntil
    | ArmTimer
    | Syscall
    | TrapReturn
    | SwitchThread
    | Mark
    | XorMemory
    | StartDma
    | FinishedDma
    | MappingChanged
    | ReleaseFrame
    | Physical
)
