"""A physical CPU: registers, a TLB, and two engines that run instructions until something happens.

One door, `PhysicalCpu.run(work, user, at)`: single operations with data (`ops`) and access blocks
(`trace`) alike go through the same MMU kernels and end in one `Exit`. The CPU decides nothing about
privileged work and delivers no fault: that is for whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from penumbra.hw import mmu_layout as k
from penumbra.hw import operations as o
from penumbra.hw.compiled import Kernels, kernels_for
from penumbra.hw.device_window import DevicePort
from penumbra.hw.device_window import refused as refused_by_window
from penumbra.hw.exits import (
    BudgetSpent,
    BufferFull,
    Done,
    Exit,
    GeneralProtection,
    MachineCheck,
    PageFault,
    Privileged,
    Spinning,
    SystemCall,
    TlbMiss,
)
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, FormatSpec
from penumbra.hw.memory import Ram
from penumbra.hw.ports import TlbPorts
from penumbra.hw.streams import FETCH, READ, WRITE, AccessStream
from penumbra.hw.tlb import Tlb, TlbGeometry
from penumbra.hw.write_buffer import NO_BUFFER, BufferSpec, WriteBuffer

UsedHook = Callable[[int, int, bool, int], None]
FlaggedHook = Callable[[int, int, int, int], None]
BlockHook = Callable[[int, AccessStream, int, npt.NDArray[np.int64]], None]

_PRIVILEGED = (
    o.Invlpg,
    o.LoadControl,
    o.ReadControl,
    o.SendIpi,
    o.Halt,
    o.SetInterrupts,
    o.ArmTimer,
    o.SwitchThread,
    o.StartDma,
    o.FinishedDma,
    o.MappingChanged,
    o.ReleaseFrame,
)
_PHYSICAL = (o.LoadPhysical, o.StorePhysical, o.ExchangePhysical)
# Stores of up to eight bytes that are made whole or not at all.
_WHOLE_STORES = o.Store | o.Exchange | o.CompareExchange | o.XorMemory
# What stores through translations, and so through marked entries.
_STORES: tuple[type, ...] = (
    o.Store,
    o.Exchange,
    o.CompareExchange,
    o.XorMemory,
    o.Fill,
    o.Copy,
    o.Block,
)
_CAUSES = {READ: 13, WRITE: 15, FETCH: 12}  # RISC-V's page faults
_MASK64 = (1 << 64) - 1
_FEW, _MANY = 4, 64  # addresses of INVLPG from which, and up to which, one call takes them all
_IN_PAGE, _REFERENCES, _MARKED = PAGE_BYTES - 1, k.R_REFERENCES, k.R_MARKED
_DONE = Done()
_PRIVILEGED_EXIT = Privileged()
_SPIN_REFUSED = GeneralProtection("a spin on a device register: only loads see it change")
_FETCH_REFUSED = GeneralProtection("an instruction fetch from the device window")
_SYSTEM_CALL = SystemCall()


class PhysicalCpu:
    """One CPU over shared RAM and a TLB of its own (or shared with siblings).

    Invariant: `reg` and the TLB array are changed by the kernels and by this class only.

    Attributes:
        machine_checks: Whether an access beyond RAM is a machine check. Else, as on a PC, reads are
            all ones and writes vanish; so it is for walks and for what is done on others' behalf.
        on_used: Called for each single access with (gva, kind, user, pfn), or None.
        on_flagged: Called after each store to a flagged frame with (hpa, size, old, new).
        write_buffer: The guest write buffer; without room for a record it marks nothing.
        device: What answers at the page of device registers; None: nothing does.
        on_block: Called for each finished piece of a block with (stream id, stream, start, frames);
            `frames` is a view that the next piece overwrites.
    """

    def __init__(
        self,
        cpu_id: int,
        spec: FormatSpec,
        ram: Ram,
        tlb: Tlb,
        streams: Sequence[AccessStream] = (),
        kernels: Kernels | None = None,
        buffer: BufferSpec = NO_BUFFER,
    ) -> None:
        self.cpu_id = cpu_id
        self.spec = spec
        self.ram = ram
        self.tlb = tlb
        # A 32-bit address wraps; in 64 bits what is not below bit 47 may be non-canonical.
        wide = spec.sign_extended
        self._gva_mask = _MASK64 if wide else (1 << spec.va_bits) - 1
        self._suspect = ~((1 << (spec.va_bits - wide)) - 1)
        self.streams = streams
        self.machine_checks = False
        self.on_used: UsedHook | None = None
        self.on_flagged: FlaggedHook | None = None
        self.on_block: BlockHook | None = None
        self.device: DevicePort | None = None
        self._ram_end = ram.n_frames << PAGE_SHIFT
        self._spent = 0  # progress of the operation under way before the access under way
        n_words = k.REG_WORDS + 2 * buffer.records
        self._reg_array = self.registers = np.zeros(n_words, np.int64)
        self.reg = self._reg_array.data
        self.write_buffer = WriteBuffer(self.reg, buffer)
        self.write_buffer.set_up()
        self.reg[k.R_FRAMES] = ram.n_frames
        self.reg[k.R_GTAG] = ((1 << 23) | cpu_id) << k.TAG_SHIFT
        kernels = kernels or kernels_for(spec)
        self._compiled = kernels.compiled
        self._functions = functions = kernels.functions
        self._translate = functions.translate
        self._run_block = functions.run_block
        self._invlpg = functions.invlpg
        self._invlpg_all = functions.invlpg_all
        self._addresses = np.zeros(_MANY, np.int64)
        self._flush = functions.flush
        self._log_store = functions.log_store
        self._settle_log = functions.settle_log
        self._retire = functions.retire
        self._second = functions.second
        if kernels.compiled:
            self._reg_arg, self._tlb_arg = self._reg_array, tlb.array
            self._ram_args = (ram.array64, ram.array32)
            self._flags_arg = ram.flags_array
        else:
            self._reg_arg, self._tlb_arg = self.reg, tlb.view  # type: ignore[assignment]
            self._ram_args = (ram.i64, ram.u32)  # type: ignore[assignment]
            self._flags_arg = ram.flags  # type: ignore[assignment]
        self._used = np.zeros(1024, np.int64)
        self._engines: dict[type, Callable[..., Exit]] = {
            o.Load: self._load,
            o.Store: self._store,
            o.Exchange: self._exchange,
            o.CompareExchange: self._compare_exchange,
            o.XorMemory: self._xor,
            o.Fill: self._fill,
            o.Copy: self._copy,
            o.Block: self._block,
            o.SpinUntil: self._spin,
            o.Syscall: self._syscall,
            o.TrapReturn: self._supervisor_only,
            o.Mark: self._nothing,
        }
        self._engines.update(dict.fromkeys(_PRIVILEGED, self._supervisor_only))
        self._engines.update(dict.fromkeys(_PHYSICAL, self._physical))
        if buffer.records:
            for store in _STORES:
                self._engines[store] = self._retired(self._engines[store])
        if buffer.late:
            self._engines = {work: self._settled(do) for work, do in self._engines.items()}

    # ---- registers and invalidation -------------------------------------------------------------

    def set_modes(
        self, *, wp: bool, pse: bool, pge: bool, nxe: bool, pg: bool = True, reload: bool = False
    ) -> GeneralProtection | None:
        """Set the mode bits the MMU evaluates at each use; flushes nothing.

        Where the format holds its top level in registers, a change of PG, PSE or PGE under paging
        loads them again, and reserved bits there refuse the change. `reload`: a bit has changed
        that has no other effect here (CR0.CD, CR0.NW, CR4.PAE, CR4.SMEP) and loads them, too.

        Source: SDM vol. 3, 4.4.1.
        """
        reg = self.reg
        before = (reg[k.R_PG], reg[k.R_PSE], reg[k.R_PGE])
        if pg and self.spec.root_registers and (reload or before != (pg, pse, pge)):
            refused = self._load_top(reg[k.R_ROOT])
            if refused is not None:
                return refused
        reg[k.R_WP], reg[k.R_PSE], reg[k.R_PGE] = wp, pse, pge
        reg[k.R_NXE], reg[k.R_PG] = nxe, pg
        self._tag()
        return None

    def attach_device(self, device: DevicePort | None) -> None:
        """Let this answer at its frame from now on, which must lie beyond RAM."""
        assert device is None or device.pfn >= self.ram.n_frames
        self.device = device
        self.reg[k.R_DEVICE] = device.pfn if device else 0

    def set_smep(self, smep: bool) -> None:
        """Set CR4.SMEP: whether a supervisor's fetch from a user page faults; flushes nothing.

        Source: SDM vol. 3, 4.6.1, 4.7.
        """
        self.reg[k.R_SMEP] = smep

    def load_root(self, root: int, top: Sequence[int] = ()) -> GeneralProtection | None:
        """MOV CR3: bits outside the root's address are ignored; global entries stay under CR4.PGE.

        Where the format holds its top level in registers they are loaded here, and stay as they are
        until the next load. A reserved bit in one refuses the load, which then changed nothing.

        Args:
            top: What a monitor restores these registers to (a VM entry), in place of a load.

        Source: SDM vol. 3, 4.4.1, 27.3.2.4.
        """
        root &= self.spec.root_mask
        refused = None if top else self._load_top(root)
        if refused is not None:
            return refused
        for i, entry in enumerate(top):
            self.reg[k.R_TOP + i] = _signed(entry)
        self.reg[k.R_ROOT] = root
        self._tag()
        if self.spec.root_load_flushes:
            self._flush(self._tlb_arg, 1 if self.reg[k.R_PGE] else 0)
        return None

    def load_satp(self, satp: int) -> None:
        """Write a RISC-V hart's `satp`: mode, address-space number, root; drops nothing.

        A mode other than Bare and Sv39 leaves everything as it was.

        Source: RISC-V privileged specification, 4.1.11.
        """
        mode = satp >> 60
        if mode in (0, 8):
            self.reg[k.R_PG] = mode != 0
            self.reg[k.R_ROOT] = (satp & ((1 << 44) - 1)) << PAGE_SHIFT
            self.reg[k.R_TAG] = (satp >> 44 & 0xFFFF) << k.TAG_SHIFT

    def set_hart(self, *, sum_: bool, mxr: bool, sets_ad: bool, keeps_invalid: bool) -> None:
        """Set what a RISC-V hart is and does: SUM, MXR, who sets A and D, what it may cache."""
        reg = self.reg
        reg[k.R_SUM], reg[k.R_MXR], reg[k.R_SETS_AD] = sum_, mxr, sets_ad
        reg[k.R_KEEPS_INVALID] = keeps_invalid and self.spec.may_cache_not_present

    def sfence_vma(self, gva: int | None = None, asid: int | None = None) -> None:
        """SFENCE.VMA: drop leaves of an address, or all, of an address space, or of all.

        With an address upper-level entries stay; with an address space, global translations do.

        Source: RISC-V privileged specification, 4.2.1.
        """
        tlb, spec = self.tlb, self.spec
        page = None if gva is None else (gva >> PAGE_SHIFT) & ((1 << (spec.va_bits - 12)) - 1)
        tlb.drop(page, asid, [level.shift - PAGE_SHIFT for level in spec.levels])

    @property
    def top_entries(self) -> tuple[int, ...]:
        """What the registers of the top level hold; empty in formats without."""
        reg, n = self.reg, self.spec.root_registers
        return tuple(reg[k.R_TOP + i] & _MASK64 for i in range(n))

    def _load_top(self, root: int) -> GeneralProtection | None:
        """Load the registers that hold the top level, all or none."""
        if self.spec.root_registers and self.reg[k.R_SECOND]:
            root = self._second(self._ram_args[0], self._reg_arg, root, False)
            if root < 0:  # no walk: what the second level lacks here reads as ones
                self.reg[k.R_VIOLATION], root = 0, self._ram_end
        entries = [self.ram.load(root + 8 * i, 8) for i in range(self.spec.root_registers)]
        for i, entry in enumerate(entries):
            if self.spec.bad_root_entry(entry):
                return GeneralProtection(f"reserved bits in top-level entry {i}: {entry:#x}")
        for i, entry in enumerate(entries):
            self.reg[k.R_TOP + i] = _signed(entry)
        return None

    def _tag(self) -> None:
        """Tag entries by root, and by CR4.PSE where it decides what an entry says.

        Siblings with one TLB may use each other's entries only if they would walk alike. What a
        walk from top-level registers finds depends on when they were loaded, so those siblings
        share none: their tag holds the CPU, too. It begins below the field of other formats, where
        a 32-bit address's page number never reaches. Below a second level equal roots of two guests
        are different tables: the tag is the CPU alone, whose root loads leave no older entries.
        """
        reg = self.reg
        if self.spec.root_registers:
            reg[k.R_TAG] = reg[k.R_ROOT] >> 5 << 32 | (self.cpu_id & 0xFF) << 24
            return
        tag = self.cpu_id if reg[k.R_SECOND] else reg[k.R_ROOT] >> PAGE_SHIFT & 0x7FFFFF
        if self.spec.large_needs_pse and reg[k.R_PSE]:
            tag |= 1 << 22  # above any root of a format with 32-bit entries
        reg[k.R_TAG] = tag << k.TAG_SHIFT

    def load_second_level(self, root: int) -> None:
        """Translate what the guest takes for physical by a second-level table from now on.

        Translations are cached combined, so a change of the table that takes something away asks
        for `flush_all`; one that adds to it does not.

        Args:
            root: Its machine address; 0 switches nested paging off.

        Source: SDM vol. 3, 29.3 (EPT), 29.4.3.
        """
        self.reg[k.R_SECOND] = root
        self._tag()
        self.reg[k.R_VIOLATION] = 0
        self.flush_all()

    def flush_all(self) -> None:
        """Drop every translation, global ones included."""
        self._flush(self._tlb_arg, 0)

    def invlpg(self, gva: int) -> None:
        """INVLPG on this CPU."""
        self._invlpg(self._reg_arg, self._tlb_arg, _signed(gva))

    def invlpg_all(self, gvas: Sequence[int]) -> None:
        """INVLPG of each address: many at a time, for a call of compiled code has its price."""
        if len(gvas) < _FEW or not self._compiled:
            for gva in gvas:
                self._invlpg(self._reg_arg, self._tlb_arg, _signed(gva))
            return
        at = self._addresses
        for first in range(0, len(gvas), len(at)):
            some = gvas[first : first + len(at)]
            at[: len(some)] = [_signed(gva) for gva in some]
            self._invlpg_all(self._reg_arg, self._tlb_arg, at, len(some))

    def let_software_manage(self) -> TlbPorts:
        """Walk no more: a miss traps (`TlbMiss`), and software fills the TLB through these ports.

        Raises:
            ValueError: One access may need two entries of a set, and the sets are smaller.

        Source: A40 [0013], [0018].
        """
        if self.tlb.geometry.ways < 2:
            raise ValueError("a TLB that software manages needs two ways")
        self.reg[k.R_SOFTWARE] = 1
        arrays = (*self._ram_args, self._reg_arg, self._tlb_arg)
        return TlbPorts(self.spec, self.ram, self.tlb, self.reg, self._functions, arrays)

    # ---- the door -------------------------------------------------------------------------------

    def run(self, work: o.Operation, user: bool, at: int = 0) -> Exit:
        """Run `work` until it is done or something happens.

        Args:
            user: CPL 3, or 0-2.
            at: Where a restartable operation goes on: run index or byte offset of an earlier exit.
        """
        return self._engines[type(work)](work, user, at)

    def translate(self, gva: int, kind: int, user: bool) -> int:
        """Return the frame an access uses, or -1 with the fault in `fault()`."""
        return int(
            self._translate(
                *self._ram_args, self._reg_arg, self._tlb_arg, _signed(gva), kind, int(user)
            )
        )

    def fault(self, kind: int, at: int = 0) -> PageFault | TlbMiss:
        """Return the fault, or the miss that software has to answer, of the last translation."""
        reg = self.reg
        gva, error = reg[k.R_FAULT_GVA] & _MASK64, reg[k.R_FAULT_ERROR]
        if error < 0:
            return TlbMiss(gva, error, at, kind)
        gpa = (reg[k.R_VIOLATION] & ~1) if reg[k.R_VIOLATION] else -1
        return PageFault(gva, error, at, kind, gpa)

    # ---- single operations ----------------------------------------------------------------------

    def _frame(self, gva: int, kind: int, user: bool) -> int:
        """Translate and report; -1 is a fault. Raises _NonCanonicalError."""
        if gva & self._suspect and not self.spec.canonical(gva):
            if self.spec.rwx:  # a page fault there, #GP on x86
                self.reg[k.R_FAULT_GVA], self.reg[k.R_FAULT_ERROR] = _signed(gva), _CAUSES[kind]
                return -1
            raise _NonCanonicalError(gva)
        pfn: int = self._translate(
            *self._ram_args, self._reg_arg, self._tlb_arg, _signed(gva), kind, 1 if user else 0
        )
        if pfn >= 0 and self.on_used is not None:
            self.on_used(gva, kind, user, pfn)
        return pfn

    def _access(self, gva: int, size: int, kind: int, user: bool) -> list[tuple[int, int]] | Exit:
        """Translate a whole single access and count it; return what `_parts` does."""
        parts = self._parts(gva, size, kind, user)
        if isinstance(parts, list):
            if parts[0][0] >= self._ram_end or parts[-1][0] >= self._ram_end:
                refusal = self._refusal(parts)
                if refusal is not None:
                    return refusal
            self.reg[k.R_REFERENCES] += len(parts)
        return parts

    def _of_device(self, hpa: int) -> bool:
        return self.device is not None and hpa >> PAGE_SHIFT == self.device.pfn

    def _refusal(self, parts: Sequence[tuple[int, int]]) -> GeneralProtection | None:
        """Refuse an access that is not one to RAM and not one to one device register."""
        of_device = [(hpa, n) for hpa, n in parts if self._of_device(hpa)]
        if not of_device:
            return None
        if len(parts) > 1:
            return GeneralProtection("an access crosses into the device window")
        hpa, n = of_device[0]
        why = refused_by_window(hpa & (PAGE_BYTES - 1), n)
        return None if why is None else GeneralProtection(why)

    def _parts(self, gva: int, size: int, kind: int, user: bool) -> list[tuple[int, int]] | Exit:
        """Translate all pages of an access before any byte moves; return (hpa, bytes) parts."""
        if not 0 < size <= PAGE_BYTES:
            return GeneralProtection(f"access of {size} bytes")
        first = min(size, PAGE_BYTES - (gva & (PAGE_BYTES - 1)))
        parts = []
        marked = []
        for start, n in ((gva, first), ((gva + first) & self._gva_mask, size - first)):
            if n == 0:
                break
            try:
                pfn = self._frame(start, kind, user)
            except _NonCanonicalError as error:
                return GeneralProtection(str(error))
            if pfn < 0:
                return self.fault(kind)
            if self.machine_checks and self._is_nowhere(pfn):
                return MachineCheck(start, pfn << PAGE_SHIFT | start & (PAGE_BYTES - 1))
            parts.append(((pfn << PAGE_SHIFT) | (start & (PAGE_BYTES - 1)), n))
            if kind == WRITE and self.reg[k.R_MARKED]:
                marked.append(parts[-1])
        return BufferFull() if marked and not self._log(marked) else parts

    def _is_nowhere(self, pfn: int) -> bool:
        """Tell whether a frame is neither RAM nor a device."""
        return pfn >= self.ram.n_frames and pfn != self.reg[k.R_DEVICE]

    def _log(self, stores: list[tuple[int, int]]) -> bool:
        """Log all stores of an access, or none: False is a full buffer."""
        if len(stores) > 1 and not self.write_buffer.has_room(len(stores)):
            return False
        return all(self._log_store(self._reg_arg, hpa, n) for hpa, n in stores)

    def _retired(self, do: Callable[..., Exit]) -> Callable[..., Exit]:
        """Return an engine after which the records of its stores may be taken for good."""

        def run(work: o.Operation, user: bool, at: int) -> Exit:
            stop = do(work, user, at)
            self._retire(self._reg_arg)
            return stop

        return run

    def _settled(self, do: Callable[..., Exit]) -> Callable[..., Exit]:
        """Return an engine of a CPU that logs late: at its next operation, whichever that is."""

        def run(work: o.Operation, user: bool, at: int) -> Exit:
            if not self._settle_log(self._reg_arg):
                return BufferFull(at)
            return do(work, user, at)

        return run

    def _put(self, hpa: int, size: int, value: int) -> None:
        """Store to RAM and tell whoever flagged the frame."""
        pfn = hpa >> PAGE_SHIFT
        ram = self.ram
        if pfn < ram.n_frames and ram.flags[pfn] and self.on_flagged is not None:
            old = ram.load(hpa, size)
            ram.store(hpa, size, value)
            self.on_flagged(hpa, size, old, value)
        elif pfn >= ram.n_frames and self.device is not None and pfn == self.device.pfn:
            self.device.store(hpa, size, value, self._spent)
        else:
            ram.store(hpa, size, value)

    def _fetched(self, hpa: int, size: int) -> int:
        """Load from RAM or from a device register."""
        if hpa >= self._ram_end and self.device is not None and self._of_device(hpa):
            return self.device.load(hpa, size, self._spent)
        return self.ram.load(hpa, size)

    def _simple(self, work: o.Load | o.Store, kind: int, user: bool) -> int:
        """Translate and count an access of one page, which nearly every one is.

        Returns:
            Its machine address; -1: a fault, -2: one for `_access`, -3: a full write buffer.
        """
        gva, size = work.gva, work.size
        inside = gva & _IN_PAGE
        if not 0 < size <= PAGE_BYTES - inside or gva & self._suspect or self.machine_checks:
            return -2
        pfn: int = self._translate(
            *self._ram_args, self._reg_arg, self._tlb_arg, gva, kind, 1 if user else 0
        )
        if pfn < 0:
            return -1
        hpa, reg = pfn << PAGE_SHIFT | inside, self.reg
        if hpa >= self._ram_end:
            return -2
        if self.on_used is not None:
            self.on_used(gva, kind, user, pfn)
        if kind == WRITE and reg[_MARKED] and not self._log([(hpa, size)]):
            return -3
        reg[_REFERENCES] += 1
        return hpa

    def _load(self, work: o.Load, user: bool, at: int) -> Exit:
        hpa = self._simple(work, READ, user)
        if hpa >= 0:
            return Done(self.ram.load(hpa, work.size))
        if hpa == -1:
            return self.fault(READ)
        parts = self._access(work.gva, work.size, READ, user)
        if not isinstance(parts, list):
            return parts
        return Done(self._get(parts))

    def _get(self, parts: list[tuple[int, int]]) -> int:
        value = shift = 0
        for hpa, n in parts:
            value |= self._fetched(hpa, n) << shift
            shift += 8 * n
        return value

    def _put_parts(self, parts: list[tuple[int, int]], value: int) -> None:
        for hpa, n in parts:
            self._put(hpa, n, value & ((1 << (8 * n)) - 1))
            value >>= 8 * n

    def _store(self, work: o.Store, user: bool, at: int) -> Exit:
        hpa = self._simple(work, WRITE, user)
        if hpa >= 0:
            self._put(hpa, work.size, work.value & ((1 << (8 * work.size)) - 1))
            return _DONE
        if hpa != -2:
            return self.fault(WRITE) if hpa == -1 else BufferFull()
        parts = self._access(work.gva, work.size, WRITE, user)
        if not isinstance(parts, list):
            return parts
        self._put_parts(parts, work.value)
        return _DONE

    def _exchange(self, work: o.Exchange, user: bool, at: int) -> Exit:
        parts = self._access(work.gva, work.size, WRITE, user)
        if not isinstance(parts, list):
            return parts
        old = self._get(parts)
        self._put_parts(parts, work.value)
        return Done(old)

    def _compare_exchange(self, work: o.CompareExchange, user: bool, at: int) -> Exit:
        parts = self._access(work.gva, work.size, WRITE, user)
        if not isinstance(parts, list):
            return parts
        old = self._get(parts)
        if old == work.expected:
            self._put_parts(parts, work.value)
        return Done(old)

    def _xor(self, work: o.XorMemory, user: bool, at: int) -> Exit:
        parts = self._access(work.gva, work.size, WRITE, user)
        if not isinstance(parts, list):
            return parts
        old = self._get(parts)
        self._put_parts(parts, old ^ work.value)
        return Done(old)

    def _spin(self, work: o.SpinUntil, user: bool, at: int) -> Exit:
        parts = self._access(work.gva, work.size, READ, user)
        if not isinstance(parts, list):
            return parts
        if self._of_device(parts[0][0]):
            return _SPIN_REFUSED
        value = self._get(parts)
        return Done(value) if value & work.mask == work.value else Spinning(parts[0][0])

    # ---- string operations ----------------------------------------------------------------------

    def _fill(self, work: o.Fill, user: bool, at: int) -> Exit:
        if (work.gva | work.n_bytes) & 7:
            return GeneralProtection("unaligned fill")
        value = work.value & _MASK64
        start = at
        while at < work.n_bytes:
            n = min(work.n_bytes - at, PAGE_BYTES - ((work.gva + at) & (PAGE_BYTES - 1)))
            parts = self._parts(work.gva + at, n, WRITE, user)
            if not isinstance(parts, list):
                return _resume_at(parts, at)
            self.reg[k.R_REFERENCES] += n >> 3
            hpa = parts[0][0]
            pfn = hpa >> PAGE_SHIFT
            if pfn < self.ram.n_frames and not self.ram.flags[pfn]:
                self.ram.array64[hpa >> 3 : (hpa + n) >> 3] = _signed(value)
            else:
                for offset in range(0, n, 8):
                    self._spent = (at + offset - start) >> 3
                    self._put(hpa + offset, 8, value)
                self._spent = 0
            at += n
        return _DONE

    def _copy(self, work: o.Copy, user: bool, at: int) -> Exit:
        if (work.src | work.dst | work.n_bytes) & 7:
            return GeneralProtection("unaligned copy")
        page = PAGE_BYTES - 1
        start = at
        while at < work.n_bytes:
            src, dst = work.src + at, work.dst + at
            n = min(work.n_bytes - at, PAGE_BYTES - (src & page), PAGE_BYTES - (dst & page))
            source = self._parts(src, n, READ, user)
            if not isinstance(source, list):
                return _resume_at(source, at)
            target = self._parts(dst, n, WRITE, user)
            if not isinstance(target, list):
                return _resume_at(target, at)
            self.reg[k.R_REFERENCES] += n >> 2
            a, b, ram = source[0][0], target[0][0], self.ram
            inside = max(a, b) >> PAGE_SHIFT < ram.n_frames
            if inside and not ram.flags[b >> PAGE_SHIFT] and a >> PAGE_SHIFT != b >> PAGE_SHIFT:
                ram.array64[b >> 3 : (b + n) >> 3] = ram.array64[a >> 3 : (a + n) >> 3]
            else:
                for offset in range(0, n, 8):
                    self._spent = (at + offset - start) >> 3
                    self._put(b + offset, 8, self._fetched(a + offset, 8))
                self._spent = 0
            at += n
        return _DONE

    # ---- access blocks --------------------------------------------------------------------------

    def _block(self, work: o.Block, user: bool, at: int) -> Exit:
        at = max(at, work.start)
        if not 0 <= work.stream < len(self.streams):
            return GeneralProtection(f"no stream {work.stream}")
        stream = self.streams[work.stream]
        pages, runs = stream.pages, stream.runs
        if at < 0 or work.stop > len(runs):
            return GeneralProtection(f"runs {at} to {work.stop} of {len(runs)}")
        if not self._compiled:
            pages, runs = pages.data, runs.data  # type: ignore[assignment]
        if len(self._used) < work.stop - at:
            self._used = np.zeros(work.stop - at, np.int64)
        used = self._used if self._compiled else self._used.data
        while True:
            start = at
            at = self._run_block(
                *self._ram_args, self._flags_arg, self._reg_arg, self._tlb_arg,
                pages, runs, used, start, work.stop, stream.salt,
            )  # fmt: skip
            if self.on_block is not None and at > start:
                self.on_block(work.stream, stream, start, self._used[: at - start])
            if self.machine_checks and (checked := self._beyond(stream, start, at)) is not None:
                return checked
            reason = self.reg[k.R_REASON]
            if reason == k.REASON_WATCHED and self._watched_run(work.stream, stream, at):
                at += 1
            elif reason in (k.REASON_BUFFER_FULL, k.REASON_WATCHED):
                return BufferFull(at)
            elif reason == k.REASON_DEVICE:
                if int(runs[at]) & 3 == FETCH:
                    return _FETCH_REFUSED
                self._device_run(work.stream, stream, at)
                at += 1
            elif reason == k.REASON_FAULT:
                return self.fault(int(runs[at]) & 3, at)
            elif reason == k.REASON_BUDGET:
                return BudgetSpent(at)
            else:
                return _DONE

    def _beyond(self, stream: AccessStream, start: int, stop: int) -> MachineCheck | None:
        """Return the machine check of the first run of a piece that used a frame beyond RAM."""
        # Runs on a device are not among these.
        beyond = np.flatnonzero(self._used[: stop - start] >= self.ram.n_frames)
        if not len(beyond):
            return None
        run, pfn = int(stream.runs[start + beyond[0]]), int(self._used[beyond[0]])
        inside = (run >> 2) & 0xFFF
        page = int(stream.pages[run >> 40])
        return MachineCheck(page << PAGE_SHIFT | inside, pfn << PAGE_SHIFT | inside)

    def _watched_run(self, stream_id: int, stream: AccessStream, at: int) -> bool:
        """Do one write run whose frame is flagged: the store is seen by whoever flagged it.

        False is a full buffer; nothing was done.
        """
        run = int(stream.runs[at])
        gva = int(stream.pages[run >> 40]) << PAGE_SHIFT
        pfn = self.translate(gva, WRITE, True)
        hpa = (pfn << PAGE_SHIFT) | ((run >> 2) & 0xFF8)
        if self.reg[k.R_MARKED] and not self._log([(hpa, 8)]):
            return False
        self._put(hpa, 8, (stream.salt << 40) + at)
        count = (run >> 14) & k.MAX_RUN_COUNT
        self.reg[k.R_PROGRESS] += count
        self.reg[k.R_REFERENCES] += count
        if self.on_block is not None:
            self.on_block(stream_id, stream, at, np.array([pfn], np.int64))
        return True

    def _device_run(self, stream_id: int, stream: AccessStream, at: int) -> None:
        """Do one run on the page of device registers: one access, as to RAM."""
        run = int(stream.runs[at])
        kind = run & 3
        pfn = self.translate(int(stream.pages[run >> 40]) << PAGE_SHIFT, kind, True)
        hpa = (pfn << PAGE_SHIFT) | ((run >> 2) & 0xFF8)
        self._spent = self.reg[k.R_PROGRESS]
        self._make_run(stream, at, hpa)
        self._spent = 0
        count = (run >> 14) & k.MAX_RUN_COUNT
        self.reg[k.R_PROGRESS] += count
        self.reg[k.R_REFERENCES] += count
        if self.on_block is not None:
            self.on_block(stream_id, stream, at, np.array([pfn], np.int64))

    def _make_run(self, stream: AccessStream, at: int, hpa: int) -> None:
        """Make the store of a run, or its load where that may have an effect."""
        if int(stream.runs[at]) & 3 == WRITE:
            self._put(hpa, 8, (stream.salt << 40) + at)
        elif self._of_device(hpa):
            self._fetched(hpa, 8)

    # ---- work done on somebody's behalf ---------------------------------------------------------

    def next_accesses(self, work: o.Operation, at: int) -> list[tuple[int, int, int]]:
        """Return what the next step of `work` touches, page by page: (gva, bytes, kind).

        A monitor that emulates an access translates these itself and calls `complete`. A physical
        operation has a guest-physical address in the place of `gva`.
        """
        if work.__class__ is o.Store and (at_once := self._in_one(work)):
            return at_once
        if isinstance(work, _PHYSICAL):
            kind = READ if isinstance(work, o.LoadPhysical) else WRITE
            return [(work.gpa, work.size, kind)]
        if isinstance(work, o.Block):
            at = max(at, work.start)
            run = int(self.streams[work.stream].runs[at])
            page = int(self.streams[work.stream].pages[run >> 40])
            return [((page << PAGE_SHIFT) | ((run >> 2) & 0xFF8), 8, run & 3)]
        if isinstance(work, o.Fill):
            return [(work.gva + at, 8, WRITE)]
        if isinstance(work, o.Copy):
            return [(work.src + at, 8, READ), (work.dst + at, 8, WRITE)]
        if isinstance(work, _WHOLE_STORES | o.Load | o.SpinUntil):
            kind = WRITE if isinstance(work, _WHOLE_STORES) else READ
            first = min(work.size, PAGE_BYTES - (work.gva & (PAGE_BYTES - 1)))
            parts = [(work.gva, first, kind)]
            if first < work.size:
                parts.append(((work.gva + first) & self._gva_mask, work.size - first, kind))
            return parts
        raise TypeError(f"{type(work).__name__} makes no access to emulate")

    def _in_one(self, work: Any) -> list[tuple[int, int, int]]:
        """Return the one access of a store inside a page; nothing of one that crosses."""
        gva, size = work.gva, work.size
        return [(gva, size, WRITE)] if size <= PAGE_BYTES - (gva & _IN_PAGE) else []

    def complete(
        self, work: o.Operation, at: int, hpas: Sequence[int]
    ) -> tuple[Done | GeneralProtection | None, int]:
        """Carry out the step of `next_accesses` at the given machine addresses.

        Returns:
            `Done` when the operation is complete, #GP if a device refuses it, else None, and where
            it goes on.
        """
        if work.__class__ is o.Store and len(hpas) == 1 and hpas[0] < self._ram_end:
            assert isinstance(work, o.Store)
            self.reg[_REFERENCES] += 1
            self._put(hpas[0], work.size, work.value & ((1 << (8 * work.size)) - 1))
            return _DONE, at
        accesses = self.next_accesses(work, at)
        parts = [(hpa, n) for hpa, (_, n, _) in zip(hpas, accesses, strict=True)]
        refusal = self._refused_step(work, accesses[0][2], parts)
        if refusal is not None:
            return refusal, at
        if isinstance(work, o.Block):
            at = max(at, work.start)
            stream = self.streams[work.stream]
            run = int(stream.runs[at])
            self._make_run(stream, at, parts[0][0])
            self.reg[k.R_REFERENCES] += (run >> 14) & k.MAX_RUN_COUNT
            return (_DONE if at + 1 == work.stop else None), at + 1
        self.reg[k.R_REFERENCES] += len(parts)
        if isinstance(work, o.Fill | o.Copy):
            if isinstance(work, o.Fill):
                value = work.value & _MASK64
            else:
                value = self._fetched(parts[0][0], 8)
            self._put(parts[-1][0], 8, value)
            return (_DONE if at + 8 >= work.n_bytes else None), at + 8
        old = 0
        if not isinstance(work, o.Store | o.StorePhysical):
            old = self._get(parts)
        if isinstance(work, o.Load | o.LoadPhysical):
            return Done(old), at
        if isinstance(work, o.SpinUntil):
            return (Done(old) if old & work.mask == work.value else None), at
        assert isinstance(work, _WHOLE_STORES | o.StorePhysical | o.ExchangePhysical)
        if isinstance(work, o.XorMemory):
            self._put_parts(parts, old ^ work.value)
        elif not isinstance(work, o.CompareExchange) or old == work.expected:
            self._put_parts(parts, work.value)
        return Done(old), at

    def _refused_step(
        self, work: o.Operation, kind: int, parts: Sequence[tuple[int, int]]
    ) -> GeneralProtection | None:
        """Refuse what the engines refuse at a device, in a step made on somebody's behalf."""
        if all(hpa < self._ram_end for hpa, _ in parts):
            return None
        at_device = any(self._of_device(hpa) for hpa, _ in parts)
        if at_device and kind == FETCH:
            return _FETCH_REFUSED
        if at_device and isinstance(work, o.SpinUntil):
            return _SPIN_REFUSED
        return None if isinstance(work, o.Fill | o.Copy) else self._refusal(parts)

    # ---- the rest -------------------------------------------------------------------------------

    def _syscall(self, work: o.Syscall, user: bool, at: int) -> Exit:
        return _SYSTEM_CALL

    def _supervisor_only(self, work: o.Operation, user: bool, at: int) -> Exit:
        if user:
            return GeneralProtection(f"{type(work).__name__} in user mode")
        return _PRIVILEGED_EXIT

    def _physical(self, work: o.Physical, user: bool, at: int) -> Exit:
        """Leave it to whoever knows what lies at a guest-physical address."""
        if (work.gpa & (PAGE_BYTES - 1)) + work.size > PAGE_BYTES:
            return GeneralProtection("a physical access crosses a page")
        return self._supervisor_only(work, user, at)

    def _nothing(self, work: o.Mark, user: bool, at: int) -> Exit:
        return _DONE


class _NonCanonicalError(Exception):
    def __init__(self, gva: int) -> None:
        super().__init__(f"non-canonical address {gva:#x}")


def _signed(value: int) -> int:
    """Return the low 64 bits of a value as the kernels' signed integers hold them."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _resume_at(stop: Exit, at: int) -> Exit:
    if isinstance(stop, PageFault):
        return PageFault(stop.gva, stop.error, at, stop.kind, stop.gpa)
    if isinstance(stop, TlbMiss):
        return TlbMiss(stop.gva, stop.missing, at, stop.kind)
    return BufferFull(at) if isinstance(stop, BufferFull) else stop


def warm_up(spec: FormatSpec) -> None:
    """Call each kernel of `spec` once, so that it is compiled and cached."""
    ram = Ram(4)
    stream = AccessStream(np.zeros(1, np.int64), np.full(1, 1 << 14, np.int64), 1)
    cpu = PhysicalCpu(0, spec, ram, Tlb(spec, TlbGeometry(16, 4, 4)), [stream])
    cpu.set_modes(wp=True, pse=False, pge=False, nxe=False)
    cpu.load_root(0)
    cpu.reg[k.R_LIMIT] = 10
    cpu.run(o.Block(0, 0, 1), user=True)
    cpu.translate(0, FETCH, True)
    cpu._log([(0, 8)])
    cpu._settle_log(cpu._reg_arg)
    cpu._retire(cpu._reg_arg)
    cpu.invlpg(0)
    cpu.invlpg_all(range(_FEW))
