"""A page of device registers at guest-physical addresses where no RAM can be.

One window serves all CPUs of a machine; each CPU finds its own local registers there, as the local
APICs of a PC all answer at one address. A register is an aligned 64-bit word; an access of 1 to 8
bytes must lie within one, and a store replaces the bytes it names before the register acts.

    020 id          r   CPU's number; number of CPUs from bit 32
    030 version     r   `VERSION`
    0b0 end          w  any store: the interrupt in service has been served
    100 in service  r   its vector, 0 if there is none
    280 error       rw  bit 5: a command named a vector that is not the window's; a store clears it
    300 command     rw  7:0 vector, 19:18 target (0: the set in 63:32, 1: itself, 2: all, 3: all
                        others); a store of the lowest byte sends
    380 timer       rw  a store of n > 0 raises `DEVICE_TIMER_VECTOR` once, n of progress later; 0
                        disarms
    390 remaining   r   progress until then, 0 if it is not armed
    400 console     rw  a store of the lowest byte puts it out; read: how many bytes were
    410 counter     r   the CPU's progress
    420 scratch     rw  64 bits, the same for all CPUs

Everything else reads as 0 and takes no notice of stores. Nothing here knows who made the access: a
CPU for its own guest, or a monitor for a guest that must not reach any hardware.

Source: A40 ¶38 (devices 280); VTLB p. 1; SDM vol. 3, 11.4-11.8, for the shape of a local APIC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penumbra.hw.formats import MAXPHYADDR, PAGE_BYTES, PAGE_SHIFT, FormatSpec
from penumbra.hw.interrupts import DEVICE_VECTORS, NEVER, InterruptController

VERSION = 0x0001_504E  # "NP", and the first
ID, VERSION_AT, END, IN_SERVICE, ERROR = 0x020, 0x030, 0x0B0, 0x100, 0x280
COMMAND, TIMER, REMAINING, CONSOLE, COUNTER, SCRATCH = 0x300, 0x380, 0x390, 0x400, 0x410, 0x420
ILLEGAL_VECTOR = 1 << 5
MAX_TEXT = 1 << 16

_WORD = 8
_MASK64 = (1 << 64) - 1
_BELOW_TOP = 0x0120_0000  # of 4 GiB: 0xFEE00000


def window_base(spec: FormatSpec) -> int:
    """Return the guest-physical address of the window's page: below the top of what is addressed.

    That is 0xFEE00000 where an entry holds 32 bits of address, 0xFFFEE00000 where it holds 40:
    above any RAM, and not where a monitor lets lead what leads nowhere.
    """
    return (1 << (32 if spec.entry_bytes == 4 else MAXPHYADDR)) - _BELOW_TOP


def window_frames(spec: FormatSpec) -> range:
    """Return the guest frames that are devices."""
    first = window_base(spec) >> PAGE_SHIFT
    return range(first, first + 1)


def refused(offset: int, size: int) -> str | None:
    """Say why an access of so many bytes at an offset in the window is none, or None."""
    if not 0 < size <= _WORD or offset % _WORD + size > _WORD:
        return f"{size} bytes at {offset:#x} of the device window are not in one register"
    return None


class Outside(Protocol):
    """What the window's lines lead to."""

    def interrupt(self, cpu: int, targets: int, vector: int, progress: int) -> None:
        """A CPU at `progress` interrupts every CPU of the bit set `targets`."""

    def line(self, cpu: int, text: str) -> None:
        """A line of text is complete; this CPU put out its last byte."""


class DeviceWindow:
    """The registers of one machine.

    Invariant: the text is at most `MAX_TEXT` bytes long; a timer that is armed is so in the CPU's
    interrupt controller, too.

    Attributes:
        text: What was put out, without what came after the first `MAX_TEXT` bytes.
        n_put: How many bytes were put out.
    """

    def __init__(self, controllers: Sequence[InterruptController], outside: Outside) -> None:
        n = len(controllers)
        self.text = bytearray()
        self.n_put = 0
        self._controllers = controllers
        self._outside = outside
        self._line = bytearray()
        self._scratch = 0
        self._command = [0] * n
        self._timer = [0] * n
        self._deadline = [NEVER] * n
        self._error = [0] * n

    def load(self, cpu: int, offset: int, size: int, progress: int) -> int:
        """Read the bytes of a register; the access must not be `refused`."""
        word = self._read(cpu, offset & -_WORD, progress)
        return word >> 8 * (offset % _WORD) & ((1 << 8 * size) - 1)

    def store(self, cpu: int, offset: int, size: int, value: int, progress: int) -> None:
        """Write the bytes of a register; the access must not be `refused`."""
        at, shift = offset & -_WORD, 8 * (offset % _WORD)
        mask = ((1 << 8 * size) - 1) << shift
        word = self._stored(cpu, at) & ~mask | value << shift & mask
        self._write(cpu, at, word, lowest=not shift, progress=progress)

    def flush(self) -> None:
        """Hand on the line that has no end yet: the machine has ended."""
        self._end_line(0)

    def _read(self, cpu: int, at: int, progress: int) -> int:
        if at == ID:
            return cpu | len(self._controllers) << 32
        if at == VERSION_AT:
            return VERSION
        if at == IN_SERVICE:
            return self._controllers[cpu].in_service or 0
        if at == REMAINING:
            deadline = self._deadline[cpu]
            return max(0, deadline - progress) if deadline < NEVER else 0
        if at == CONSOLE:
            return self.n_put
        return progress if at == COUNTER else self._stored(cpu, at)

    def _stored(self, cpu: int, at: int) -> int:
        """Return what was last stored to a register, if it keeps that."""
        if at == SCRATCH:
            return self._scratch
        kept = {ERROR: self._error, COMMAND: self._command, TIMER: self._timer}.get(at)
        return 0 if kept is None else kept[cpu]

    def _write(self, cpu: int, at: int, word: int, *, lowest: bool, progress: int) -> None:
        if at == SCRATCH:
            self._scratch = word
        elif at == CONSOLE and lowest:
            self._put(cpu, word & 0xFF)
        elif at == COMMAND:
            self._command[cpu] = word
            if lowest:
                self._send(cpu, word, progress)
        elif at == TIMER:
            self._timer[cpu] = word
            # What is due later than NEVER never is.
            self._deadline[cpu] = min(progress + word, NEVER) if word else NEVER
            self._controllers[cpu].arm_device(self._deadline[cpu])
        elif at == END:
            self._controllers[cpu].end()
        elif at == ERROR:
            self._error[cpu] = 0

    def _send(self, cpu: int, word: int, progress: int) -> None:
        vector, everyone = word & 0xFF, (1 << len(self._controllers)) - 1
        if vector not in DEVICE_VECTORS:
            self._error[cpu] |= ILLEGAL_VECTOR
            return
        targets = (word >> 32, 1 << cpu, everyone, everyone & ~(1 << cpu))[word >> 18 & 3]
        self._outside.interrupt(cpu, targets & everyone, vector, progress)

    def _put(self, cpu: int, byte: int) -> None:
        self.n_put += 1
        if len(self.text) < MAX_TEXT:
            self.text.append(byte)
            self._line.append(byte)
            if byte == ord("\n"):
                self._end_line(cpu)

    def _end_line(self, cpu: int) -> None:
        if self._line:
            line = self._line.decode("ascii", "backslashreplace").rstrip("\n")
            self._line.clear()
            self._outside.line(cpu, line)

    def check(self) -> None:
        """Assert the class invariant."""
        assert len(self.text) <= min(MAX_TEXT, self.n_put)
        for deadline, controller in zip(self._deadline, self._controllers, strict=True):
            assert controller.device_deadline in (deadline, NEVER)


class DevicePort:
    """The window as one CPU reaches it.

    Args:
        progress: Returns the CPU's progress before the operation under way.
    """

    def __init__(
        self, window: DeviceWindow, cpu: int, base: int, progress: Callable[[], int]
    ) -> None:
        self.pfn = base >> PAGE_SHIFT
        self.n_accesses = 0
        self._window = window
        self._cpu = cpu
        self._progress = progress

    def load(self, hpa: int, size: int, spent: int) -> int:
        """Read; `spent` is the progress the operation under way has made before this access."""
        self.n_accesses += 1
        offset, progress = hpa & (PAGE_BYTES - 1), self._progress() + spent
        return self._window.load(self._cpu, offset, size, progress)

    def store(self, hpa: int, size: int, value: int, spent: int) -> None:
        """Write; `spent` as for `load`."""
        self.n_accesses += 1
        offset, progress = hpa & (PAGE_BYTES - 1), self._progress() + spent
        self._window.store(self._cpu, offset, size, value & _MASK64, progress)
