"""The guest's own TLB shootdown: request in guest memory, interrupt, acknowledgements.

    request word    first page's address | number of pages (1 .. 32), or 0: reload CR3
    acknowledge     one byte per CPU, two words

The sender holds the shootdown lock, clears the bytes of those it asks, writes the request, sends
the interrupt, flushes its own TLB meanwhile, and spins with interrupts enabled until all bytes are
set: so two CPUs that want to shoot at each other both get through. Only CPUs that may have the
address space loaded are asked; an idle CPU has the kernel's root loaded and is never asked.

Five ways (`FLUSHES`), each right when the call that changed a mapping returns:

eager     as above, one round for each call
quiesce   every other CPU is stopped in its handler before the first entry changes, and flushes
          when it is let go: no CPU runs while the tables change
batched   a call that unmaps many ranges flushes once for all of them, in one round, and gives
          frames and tables away only after that; else one round for each range
lazy      unmapping asks nobody: each CPU flushes at its own next CR3 load or timer tick, and only
          when all have are the frames given away. Until then the pages may not be mapped anew;
          whoever wants to, or finds memory short, flushes eagerly first. Taking rights away,
          moving, sharing and changing the size of pages are eager: there the old mapping must not
          be used when the call returns
patch     as lazy, but the others are told which pages to drop, by a `MappingChanged` that whatever
          drives the CPUs carries to them; a CPU follows with an INVLPG of any page. Those it does
          not reach are interrupted; where it reaches nobody this is eager

INVLPG of any address also drops the paging-structure caches, and so does a CR3 load: after a flush
no CPU can still walk a table that was unlinked before it.

Source: A40 ¶30.
"""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.kernel.frames import Frames
from penumbra.guest.kernel.layout import MAX_VCPUS
from penumbra.guest.kernel.process import Cpu
from penumbra.guest.kernel.tables import AddressSpace
from penumbra.guest.kernel.vectors import VECTOR_SHOOTDOWN, VECTOR_STOP
from penumbra.guest.kernel.words import WORD_BYTES, Words, acquire, release
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT
from penumbra.hw.operations import (
    Invlpg,
    Load,
    LoadControl,
    MappingChanged,
    SendIpi,
    SetInterrupts,
    SpinUntil,
    Store,
)

_ACK_WORDS = MAX_VCPUS // 8
_STOPPED, _FLUSHED = 1, 2
_NOTHING = 1 << 63
_EVERYTHING = 0
FLUSHES = ("eager", "quiesce", "batched", "lazy", "patch")


@dataclass(eq=False, slots=True)
class _Debt:
    """Frames that are given away when the CPUs of the bit set have flushed."""

    space: AddressSpace
    first: int
    stop: int
    cpus: int
    gfns: list[int]


class Shootdown:
    """Flushes page ranges of address spaces on every CPU that may cache them.

    Invariant: between two flushes no acknowledge byte is awaited and the lock word is 0.

    Attributes:
        flush_limit: Ranges of more pages are flushed by a CR3 load.
        n_requests: Shootdowns that had to ask another CPU: rounds of interrupts.
        n_deferred: Unmappings that waited for nobody (lazy, patch).
    """

    def __init__(
        self,
        words: Words,
        kernel_root_gpa: int,
        flush_limit: int,
        bugs: frozenset[str],
        frames: Frames,
        way: str = "eager",
        n_cpus: int = 1,
    ) -> None:
        """Take the words of the protocol.

        Raises:
            ValueError: There is no such way to flush.
        """
        if way not in FLUSHES:
            raise ValueError(f"no such flush {way!r} (known: {', '.join(FLUSHES)})")
        assert 1 <= flush_limit < PAGE_BYTES
        self._lock = words.take_run(3 + _ACK_WORDS)
        self._go = self._lock + (2 + _ACK_WORDS) * WORD_BYTES
        self._frames = frames
        self._way = way
        self._all_cpus = (1 << n_cpus) - 1
        self._stopper: Cpu | None = None
        self._debts: list[_Debt] = []
        self.n_deferred = 0
        self._request = self._lock + WORD_BYTES
        self._acks = self._lock + 2 * WORD_BYTES
        self._kernel_root_gpa = kernel_root_gpa
        self.flush_limit = flush_limit
        self._bugs = bugs
        self.n_requests = 0

    @property
    def gathers(self) -> bool:
        """Whether many unmappings of one call are to share one flush."""
        return self._way == "batched"

    async def flush(self, cpu: Cpu, space: AddressSpace, first: int, n_pages: int) -> None:
        """Make every CPU forget what it cached of `n_pages` pages from `first` on.

        To be called after the stores to the tables and before frames or tables are given away.
        Returns with the interrupt flag as it found it; enables interrupts while it waits.
        """
        if "short-range" in self._bugs:
            n_pages -= 1
            if not n_pages:
                return
        few = n_pages <= self.flush_limit and not space.root_cut
        request = first << PAGE_SHIFT | n_pages if few else _EVERYTHING
        space.root_cut = False
        if self._stopper is cpu:
            await self._let_go(cpu, space, request)
            return
        targets = space.cpus & ~cpu.bit
        if not targets or self._bugs & {"skip-shootdown", "late-shootdown"}:
            await self._flush_own(cpu, space, request)
            return
        await self._ask(cpu, space, request, targets)

    async def follow_root(self, cpu: Cpu, space: AddressSpace) -> None:
        """Load this CPU's root again if it holds an older one in its registers. Faults call this.

        So each CPU finds what was added to a root when it needs it, and nobody is interrupted.
        """
        if cpu.root_changes != space.root_changes:
            assert cpu.space is space
            await self._invalidate(cpu, _EVERYTHING)

    async def flush_late(self, cpu: Cpu, space: AddressSpace, first: int, n_pages: int) -> None:
        """Do what `flush` left undone under the bug `late-shootdown`; else nothing."""
        targets = space.cpus & ~cpu.bit
        if "late-shootdown" in self._bugs and targets:
            request = first << PAGE_SHIFT | n_pages if n_pages <= self.flush_limit else 0
            await self._ask(cpu, space, request, targets)

    async def _ask(self, cpu: Cpu, space: AddressSpace, request: int, targets: int) -> None:
        self.n_requests += 1
        was_enabled = await SetInterrupts(True)
        await acquire(self._lock)
        await self._round(cpu, space, request, targets)
        await release(self._lock)
        if not was_enabled:
            await SetInterrupts(False)

    async def _round(self, cpu: Cpu, space: AddressSpace, request: int, targets: int) -> None:
        """Ask `targets`, flush here, and wait for their answers. The caller holds the lock."""
        awaited = _awaited_bytes(targets)
        for gva, _ in awaited:
            await Store(self._acks + gva, WORD_BYTES, 0)
        await Store(self._request, WORD_BYTES, request)
        await SendIpi(targets, VECTOR_SHOOTDOWN)
        await self._flush_own(cpu, space, request)
        for gva, mask in awaited:
            await SpinUntil(self._acks + gva, WORD_BYTES, mask, mask)

    # -- quiesce ----------------------------------------------------------------------------------

    async def stop_others(self, cpu: Cpu) -> None:
        """Stop every other CPU before entries change; `flush` or `resume_others` lets them go.

        The caller takes no lock meanwhile: a stopped CPU may hold it.
        """
        others = self._all_cpus & ~cpu.bit
        if self._way != "quiesce" or not others:
            return
        self.n_requests += 1
        assert await SetInterrupts(True)
        await acquire(self._lock)
        self._stopper = cpu
        await Store(self._go, WORD_BYTES, 0)
        for at, _ in _awaited_bytes(others):
            await Store(self._acks + at, WORD_BYTES, 0)
        await SendIpi(others, VECTOR_STOP)
        await self._await_all(others, _STOPPED)

    async def resume_others(self, cpu: Cpu) -> None:
        """Let the others go without a flush: nothing has changed that they could have cached."""
        if self._stopper is cpu:
            await self._let_go(cpu, None, _NOTHING)

    async def _let_go(self, cpu: Cpu, space: AddressSpace | None, request: int) -> None:
        others = self._all_cpus & ~cpu.bit
        was_enabled = await SetInterrupts(True)
        await Store(self._request, WORD_BYTES, request)
        await Store(self._go, WORD_BYTES, 1)
        if space is not None:
            await self._flush_own(cpu, space, request)
        await self._await_all(others, _FLUSHED)
        self._stopper = None
        await release(self._lock)
        if not was_enabled:
            await SetInterrupts(False)

    async def serve_stop(self, cpu: Cpu) -> None:
        """Handle the stop interrupt: stand still until let go, then flush."""
        await Store(self._acks + cpu.cpu_id, 1, _STOPPED)
        await SpinUntil(self._go, WORD_BYTES, 1, 1)
        request: int = await Load(self._request, WORD_BYTES)
        if request != _NOTHING:
            await self._invalidate(cpu, request)
        await Store(self._acks + cpu.cpu_id, 1, _FLUSHED)

    async def _await_all(self, cpus: int, value: int) -> None:
        for at, mask in _awaited_bytes(cpus):
            await SpinUntil(self._acks + at, WORD_BYTES, mask * 0xFF, mask * value)

    # -- lazy -------------------------------------------------------------------------------------

    async def defer(
        self, cpu: Cpu, space: AddressSpace, first: int, n_pages: int, gfns: list[int]
    ) -> bool:
        """Flush here alone and keep the frames until the others have; tell whether that was done.

        If not the caller has to flush and to give the frames away.
        """
        targets = space.cpus & ~cpu.bit
        if self._way not in ("lazy", "patch") or not targets or self._bugs:
            return False
        waited = targets
        if self._way == "patch":
            gva = first << PAGE_SHIFT
            waited &= await MappingChanged(targets, space.root_gpa, gva, n_pages)
            if not waited:
                return False
        # Noted after the others were told: what is paid before was flushed before.
        self.n_deferred += 1
        self._debts.append(_Debt(space, first, first + n_pages, waited, gfns))
        request = first << PAGE_SHIFT | n_pages if n_pages <= self.flush_limit else _EVERYTHING
        if targets != waited:
            await self._ask(cpu, space, request, targets & ~waited)
        else:
            await self._flush_own(cpu, space, request)
        return True

    def flushed(self, cpu: Cpu) -> None:
        """This CPU has just loaded CR3: its part of every debt is paid."""
        for debt in self._debts:
            debt.cpus &= ~cpu.bit
        self._give_paid()

    async def tick(self, cpu: Cpu) -> None:
        """At a timer tick, flush if somebody waits for this CPU."""
        owed = [debt for debt in self._debts if debt.cpus & cpu.bit]
        if not owed:
            return
        if self._way != "patch":
            await self._invalidate(cpu, _EVERYTHING)
            self.flushed(cpu)
            return
        # Any page: what this CPU was told before is dropped with it, but not what it is told while
        # the instruction retires; so only the debts of before are paid.
        await Invlpg(self._lock)
        for debt in owed:
            debt.cpus &= ~cpu.bit
        self._give_paid()

    async def settle(self, cpu: Cpu, space: AddressSpace, first: int, n_pages: int) -> None:
        """Flush eagerly what is owed of these pages: they are to be mapped anew."""
        while owed := [
            debt
            for debt in self._debts
            if debt.space is space and debt.first < first + n_pages and first < debt.stop
        ]:
            await self._pay(cpu, owed)

    async def settle_all(self, cpu: Cpu) -> bool:
        """Flush eagerly all that is owed: memory is short. Tell whether anything was."""
        owed = list(self._debts)
        if owed:
            await self._pay(cpu, owed)
        return bool(owed)

    async def _pay(self, cpu: Cpu, debts: list[_Debt]) -> None:
        for debt in debts:
            targets = debt.cpus & ~cpu.bit
            if debt.cpus & cpu.bit:
                await self._invalidate(cpu, _EVERYTHING)
            if targets:
                await self._ask(cpu, debt.space, _EVERYTHING, targets)
            debt.cpus = 0
        self._give_paid()

    def _give_paid(self) -> None:
        for debt in [debt for debt in self._debts if not debt.cpus]:
            self._debts.remove(debt)
            for gfn in debt.gfns:
                self._frames.drop(gfn)

    # -- one round --------------------------------------------------------------------------------

    async def serve(self, cpu: Cpu) -> None:
        """Handle the shootdown interrupt: flush, then acknowledge."""
        request: int = await Load(self._request, WORD_BYTES)
        if "early-acknowledge" in self._bugs:
            await Store(self._acks + cpu.cpu_id, 1, 1)
        await self._invalidate(cpu, request)
        if "early-acknowledge" not in self._bugs:
            await Store(self._acks + cpu.cpu_id, 1, 1)

    async def _flush_own(self, cpu: Cpu, space: AddressSpace, request: int) -> None:
        if space.cpus & cpu.bit and "skip-local-invlpg" not in self._bugs:
            await self._invalidate(cpu, request)

    async def _invalidate(self, cpu: Cpu, request: int) -> None:
        n_pages = request & (PAGE_BYTES - 1)
        if not n_pages:
            # Nothing switches address spaces while kernel code runs on this CPU.
            space = cpu.space
            changes = space.root_changes if space is not None else 0
            await LoadControl(3, space.root_gpa if space is not None else self._kernel_root_gpa)
            cpu.root_changes = changes
            return
        first = request & ~(PAGE_BYTES - 1)
        for gva in range(first, first + n_pages * PAGE_BYTES, PAGE_BYTES):
            await Invlpg(gva)


def _awaited_bytes(targets: int) -> list[tuple[int, int]]:
    """Return (offset, mask) of each acknowledge word that `targets` have bytes in."""
    words = []
    for word in range(_ACK_WORDS):
        cpus = targets >> (8 * word) & 0xFF
        mask = sum(1 << (8 * n) for n in range(8) if cpus >> n & 1)
        if mask:
            words.append((word * WORD_BYTES, mask))
    return words
