"""Unicorn's own MMU as an oracle: one real IA-32 instruction at a time on tables in its RAM.

The instruction runs at CPL 0 or 3 from a page that the tables map at the top of the address space.
Its CPU reaches ring 3 once, by a real IRET; each case restores the context taken there. The error
code of a fault is in no register of the interface: where it lies in the context is found out at
the start, by faults whose codes are known.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import unicorn
from unicorn import unicorn_const, x86_const

UNTYPED: Any = unicorn  # the binding's classes are, though the package says it is typed

RAM_BYTES = 8 << 20
GDT, IRET, LANDING, FRAME, CODE = 0x800, 0x900, 0x910, 0xA00, 0x1000
CODE_AT, CODE_TABLE = 0xFFC0_0000, 0x7000  # mapped by the directory's last entry
P, W, U, A = 1, 2, 4, 0x20
CR0_PE, CR0_PG, CR0_WP = 1, 1 << 31, 1 << 16

INSTRUCTIONS = {
    ("read", 1): b"\x0f\xb6\x03",  # movzx eax, byte [ebx]
    ("read", 2): b"\x0f\xb7\x03",
    ("read", 4): b"\x8b\x03",
    ("write", 1): b"\x88\x03",  # mov [ebx], al
    ("write", 2): b"\x66\x89\x03",
    ("write", 4): b"\x89\x03",
    ("xor", 1): b"\x30\x03",
    ("xor", 2): b"\x66\x31\x03",
    ("xor", 4): b"\x31\x03",
    ("xchg", 1): b"\x86\x03",
    ("xchg", 2): b"\x66\x87\x03",
    ("xchg", 4): b"\x87\x03",
    ("lock xor", 1): b"\xf0\x30\x03",
    ("lock xor", 2): b"\xf0\x66\x31\x03",
    ("lock xor", 4): b"\xf0\x31\x03",
}
# What stands where an instruction may be fetched: nop, and a jump that ends what is translated.
FETCHED = b"\x90\xeb\xfe"


class Ended(NamedTuple):
    """How an instruction ended: EAX after it, or a page fault's error code and CR2."""

    eax: int
    error: int | None = None
    cr2: int = 0


class UnicornMmu:
    """A CPU with its RAM; `words` are its 32-bit words, shared with the emulator."""

    def __init__(self) -> None:
        self.ram = np.zeros(RAM_BYTES, np.uint8)
        self.words = self.ram.view(np.uint32)
        self._uc = UNTYPED.Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_32)
        self._uc.mem_map_ptr(0, RAM_BYTES, unicorn_const.UC_PROT_ALL, self.ram.ctypes.data)
        self._place_code()
        self._contexts = {0: self._ring_0(), 3: self._ring_3()}
        self._interrupts: list[int] = []
        self._uc.hook_add(unicorn_const.UC_HOOK_INTR, self._interrupted)
        self._error_at = self._find_error_code()

    def _interrupted(self, uc: Any, number: int, _: Any) -> None:
        self._interrupts.append(number)
        uc.emu_stop()

    # ---- the ground the CPU stands on -----------------------------------------------------------

    def _place_code(self) -> None:
        flat = 0xFFFF | 0xCF << 48
        access = (0, 0x9B, 0x93, 0xFB, 0xF3)  # code and data of ring 0, then of ring 3
        for i, byte in enumerate(access):
            self.ram[GDT:IRET].view(np.uint64)[i] = flat | byte << 40 if i else 0
        self.ram[IRET] = 0xCF
        self.ram[LANDING] = 0x90
        self._slots: dict[tuple[str, int], int] = {}
        for i, (key, code) in enumerate(INSTRUCTIONS.items()):
            self._slots[key] = 16 * i
            self.ram[CODE + 16 * i :][: len(code)] = list(code)
        self.words[CODE_TABLE >> 2] = CODE | P | U | A

    def map_code(self, root: int) -> None:
        """Map the instructions in the directory at `root`."""
        self.words[(root >> 2) + 1023] = CODE_TABLE | P | U | A

    def _ring_0(self) -> Any:
        uc = self._uc
        uc.reg_write(x86_const.UC_X86_REG_GDTR, (0, GDT, 5 * 8 - 1, 0))
        uc.reg_write(x86_const.UC_X86_REG_CS, 0x08)
        for segment in (x86_const.UC_X86_REG_SS, x86_const.UC_X86_REG_DS):
            uc.reg_write(segment, 0x10)
        return uc.context_save()

    def _ring_3(self) -> Any:
        uc = self._uc
        self.words[FRAME >> 2 :][:5] = (LANDING, 0x1B, 2, 0, 0x23)  # EIP CS EFLAGS ESP SS
        uc.reg_write(x86_const.UC_X86_REG_ESP, FRAME)
        uc.emu_start(IRET, 0, count=1)
        assert uc.reg_read(x86_const.UC_X86_REG_CS) == 0x1B
        uc.reg_write(x86_const.UC_X86_REG_DS, 0x23)
        return uc.context_save()

    def _find_error_code(self) -> int:
        """Return where in a context the error code of the last page fault lies."""
        self._error_at = 0
        directory, table = 0x2000, 0x3000
        self.map_code(directory)
        self.words[directory >> 2] = table | P | W | U
        self.words[(table >> 2) + 1] = CODE | P
        known = {
            (0x0, "write", 0): 2, (0x0, "write", 3): 6, (0x0, "read", 3): 4,
            (0x1000, "read", 3): 5, (0x1000, "write", 0): 3, (0x1000, "write", 3): 7,
        }  # fmt: skip
        places: set[int] | None = None
        for (gva, kind, cpl), error in known.items():
            self.run(kind, 4, gva, 0, cpl, CR0_WP, directory, 0)
            context = bytes(self._uc.context_save())
            words = struct.unpack(f"<{len(context) // 4}i", context[: len(context) & ~3])
            found = {4 * i for i, word in enumerate(words) if word == error}
            places = found if places is None else places & found
        self.words[directory >> 2 : table + 0x1000 >> 2] = 0
        assert places is not None
        assert len(places) == 1, "no one place in the context holds the error code"
        return places.pop()

    # ---- one instruction ------------------------------------------------------------------------

    def run(
        self, kind: str, size: int, gva: int, eax: int, cpl: int, cr0: int, cr3: int, cr4: int
    ) -> Ended:
        """Run one instruction with an empty TLB; a `fetch` runs what stands at `gva`."""
        uc = self._uc
        uc.context_restore(self._contexts[cpl])
        uc.reg_write(x86_const.UC_X86_REG_CR4, cr4)
        uc.reg_write(x86_const.UC_X86_REG_CR3, cr3)
        uc.reg_write(x86_const.UC_X86_REG_CR0, cr0 | CR0_PE | CR0_PG)
        uc.ctl(unicorn_const.UC_CTL_TLB_FLUSH, unicorn_const.UC_CTL_IO_WRITE)
        uc.reg_write(x86_const.UC_X86_REG_EBX, gva)
        uc.reg_write(x86_const.UC_X86_REG_EAX, eax)
        self._interrupts.clear()
        begin = gva if kind == "fetch" else CODE_AT + self._slots[kind, size]
        uc.emu_start(begin, 0, count=1)
        after: int = uc.reg_read(x86_const.UC_X86_REG_EAX)
        if not self._interrupts:
            return Ended(after)
        assert self._interrupts == [14]
        (error,) = struct.unpack_from("<i", bytes(uc.context_save()), self._error_at)
        return Ended(after, error, uc.reg_read(x86_const.UC_X86_REG_CR2))
