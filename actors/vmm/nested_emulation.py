"""Where an access of a guest with nested paging goes that the hardware could not make.

The hardware says which guest-physical page its second level lacks; the operation may touch others,
too, so the monitor walks the guest's tables as they are now. A and D are set as the hardware would
have set them, had the second level let it.

Source: SDM vol. 3, 29.3.3 (a violation leaves A and D as they were); A40 ¶38.
"""

from __future__ import annotations

from penumbra.actors.vmm.fill import BringFrame, Forward
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.walk import GuestRegisters, GuestWalker
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, FormatSpec


class NestedWalker:
    """Translates one VCPU's addresses for the emulator; caches nothing."""

    def __init__(self, spec: FormatSpec, memory: MemoryManagement) -> None:
        self._walker = GuestWalker(spec, memory)

    def guest_address(
        self, registers: GuestRegisters, gva: int, kind: int, user: bool
    ) -> int | Forward | BringFrame:
        """Return the guest-physical address of a permitted access, or the guest's own fault."""
        if not registers.paging:
            return gva
        walker = self._walker
        permitted = walker.resolve(registers, gva, kind, user)
        unready = walker.unready()
        if unready is not None:
            return BringFrame(unready, True)
        if not permitted:
            return Forward(walker.error)
        frame = walker.frame(gva)
        walker.set_accessed(walker.steps(), kind)
        return frame << PAGE_SHIFT | gva & (PAGE_BYTES - 1)
