"""A top level held in registers (PAE): the guest's four entries, and the shadow root for them.

The guest's registers are loaded from its memory at MOV CR3 and at some changes of CR0 and CR4, and
read by every walk until the next load. So a store to the entries in memory changes nothing, no
trace stands on their page and no patch is posted for them: `REGISTERS` is the number of the table
that does not lie in guest memory.

The CPU's own registers hold the entries of one shadow root per VCPU, whatever root the guest has
loaded. Whenever one of them changes the shadow asks for a load of the CPU's root
(`ShadowSpace.reload`): at the guest's loads, at a fill that links a first table, and where a table
linked there is dropped.

Source: SDM vol. 3, 4.4.1.
"""

from __future__ import annotations

from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.shadow import NO_FRAGMENT, ShadowPage, ShadowSpace
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.exits import GeneralProtection
from penumbra.hw.formats import PAGE_SHIFT, FormatSpec, P


def read_entries(
    spec: FormatSpec, memory: MemoryManagement, cr3: int
) -> tuple[int, ...] | GeneralProtection:
    """Return what a load of the registers finds in guest memory, or why it is refused."""
    root = cr3 & spec.root_mask
    entries = tuple(
        memory.load(root + i * spec.entry_bytes, spec.entry_bytes)
        for i in range(spec.root_registers)
    )
    for i, entry in enumerate(entries):
        if spec.bad_root_entry(entry):
            return GeneralProtection(f"reserved bits in top-level entry {i}: {entry:#x}")
    return entries


def linked_tables(
    spec: FormatSpec, space: ShadowSpace, entries: tuple[int, ...]
) -> list[ShadowPage]:
    """Return the shadows there are of the tables that top-level entries lead to."""
    tables = [(entry & spec.frame_mask) >> PAGE_SHIFT for entry in entries if entry & P]
    found = (space.find((table, spec.top - 1, NO_FRAGMENT)) for table in tables)
    return [page for page in found if page is not None]


def enter_entries(spec: FormatSpec, space: ShadowSpace, registers: GuestRegisters) -> None:
    """Link in the shadow root what the guest's registers lead to and is shadowed already.

    Everything linked must be up to date. The rest is linked by fills. Afterwards the caller loads
    the CPU's root, which flushes what the links taken away here led to.
    """
    top = spec.top
    root = space.find(space.own_root) or space.create(space.own_root, low=True)
    space.root = root
    root.va_base = 0
    if not registers.paging:
        return
    for index, entry in enumerate(registers.top):
        table = (entry & spec.frame_mask) >> PAGE_SHIFT
        child = space.find((table, top - 1, NO_FRAGMENT)) if entry & P else None
        if root.children.get(index) is not child:
            space.unlink_root(index)
            if child is not None:
                space.link(root, index, child, 0, index << spec.levels[top].shift)
