"""A guest that is one kernel thread and its page tables: it times its own operations.

Coroutines of the guest run in the machine's process, so a program can read the host's clock between
two of its operations; what lies between is the whole way from the operation to its completion.

    frame 1 PML4, 2 PDPT, 3 PD, 4 the arena's PT, 5 the window's PT; the arena's frames from 8 up
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from penumbra.guest.kernel.boot import BootState, StartRegisters, control_registers
from penumbra.guest.system import LoaderMemory
from penumbra.guest.threads import GuestCoroutine, GuestThread, KernelPanic
from penumbra.hw.formats import PAGE_BYTES, X86_64, A, D, P, W
from penumbra.hw.operations import Halt

ARENA = 0x2000_0000
WINDOW = 0x2020_0000
N_PAGES = 256
ROOT = 1 << 12
_FIRST_DATA = 8


def entry_at(page: int) -> int:
    """Return the virtual address of the entry that maps a page of the arena."""
    return WINDOW + 8 * page


def entry_of(page: int, mark: int = 0) -> int:
    """Return that entry; with an odd `mark` it maps the frame of the page's neighbour."""
    return (_FIRST_DATA + (page ^ (mark & 1))) << 12 | A | D | P | W


class SmallGuest:
    """A machine's guest whose only thread runs `program` in supervisor mode, then halts."""

    def __init__(self, program: Callable[[], GuestCoroutine]) -> None:
        self._program = program
        self._finished = False
        self._threads = {0: GuestThread(0, self._run(), user=False)}

    async def _run(self) -> None:
        await self._program()
        self._finished = True
        while True:
            await Halt()

    @property
    def n_frames(self) -> int:
        return _FIRST_DATA + N_PAGES

    @property
    def backed(self) -> Sequence[int] | None:
        return None

    @property
    def threads(self) -> Mapping[int, GuestThread]:
        return self._threads

    @property
    def finished(self) -> bool:
        return self._finished

    def boot(self, memory: LoaderMemory) -> BootState:
        directory = ARENA >> 21 & 511
        for table, index, to in (
            (1, ARENA >> 39 & 511, 2),
            (2, ARENA >> 30 & 511, 3),
            (3, directory, 4),
            (3, directory + 1, 5),
            (5, 0, 4),
        ):
            memory.write(table * PAGE_BYTES + 8 * index, 8, to << 12 | P | W)
        for page in range(N_PAGES):
            memory.write(4 * PAGE_BYTES + 8 * page, 8, entry_of(page))
        cr0, cr4, efer = control_registers(X86_64)
        return BootState((StartRegisters(cr0, ROOT, cr4, efer),), (0,))

    def page_fault(self, vcpu_id: int, thread_id: int, gva: int, error: int) -> GuestCoroutine:
        return _panic(f"page fault at {gva:#x}, error {error:#x}")

    def protection_fault(self, vcpu_id: int, thread_id: int, what: str) -> GuestCoroutine:
        return _panic(what)

    def syscall(
        self, vcpu_id: int, thread_id: int, name: str, args: tuple[int, ...]
    ) -> GuestCoroutine:
        return _panic(f"system call {name}")

    def interrupt(self, vcpu_id: int, thread_id: int, vector: int) -> GuestCoroutine:
        return _panic(f"interrupt {vector}")

    def on_disk(self, entry: int) -> tuple[bool, int] | None:
        return None

    def close(self) -> None:
        for thread in self._threads.values():
            thread.close()

    def check(self) -> None:
        for thread in self._threads.values():
            thread.check()


async def _panic(reason: str) -> None:
    raise KernelPanic(reason)
