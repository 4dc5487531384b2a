"""From a scheme to the sub-VMMs of one VM: the one place where policies become objects."""

from __future__ import annotations

from collections.abc import Sequence

from penumbra.actors.core import SWITCHES, Channels, InUse, Matrix, Order, Postpone
from penumbra.actors.vmm.buffer_faults import BufferFault, buffer_fault_named
from penumbra.actors.vmm.detect import Detection, MarkForLog, WriteProtect
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.nested import SecondLevel, frames_for
from penumbra.actors.vmm.parts import Shared
from penumbra.actors.vmm.propagate import ImmediateShootdown, PatchChannels, Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.secondary import SecondaryData
from penumbra.actors.vmm.shared_shadow import Company
from penumbra.actors.vmm.subvmm import SubVmm
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.vtlb.entries import Entries
from penumbra.actors.vmm.vtlb.sharing import Pairs
from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import Storage
from penumbra.actors.vmm.vtlb.virtual_tlb import VirtualTlb
from penumbra.actors.vmm.write_buffer import BufferReader
from penumbra.hw.formats import FormatSpec
from penumbra.hw.write_buffer import NO_BUFFER, BufferSpec, StoreLog

_COALESCE = {
    "update": Order.CORRECT,
    "void": SWITCHES["void_on_coalesce"].order,
    "never": SWITCHES["no_coalescing"].order,
}


def compose_matrix(scheme: Scheme, n: int, order: Order = Order.CORRECT) -> Matrix:
    """Return the channels of `n` VCPUs as the scheme's options have them.

    Args:
        order: Switches beside those the options name.

    Raises:
        ValueError: No such step order, or no such channels for so many VCPUs.
    """
    options = scheme.options
    return Matrix(
        n,
        options.capacity,
        order=order | order_named(options.order) | _COALESCE[options.coalesce],
        channels=Channels(options.channels),
        in_use=InUse[options.in_use.upper()],
        postpone=Postpone.IN_STORE if options.postpone == "store" else Postpone.IN_CHANNEL,
    )


def compose_traces(scheme: Scheme, matrix: Matrix) -> WriteTraces:
    """Return the traces of one VM with the scheme's way of noticing stores."""
    return WriteTraces(matrix, _detection(scheme))


def compose_buffer(scheme: Scheme) -> BufferSpec:
    """Return what guest write buffer each CPU has; one without room under other schemes.

    Raises:
        ValueError: No such fault.
    """
    if scheme.detect != "write-buffer":
        return NO_BUFFER
    options, fault = scheme.options.buffer, buffer_fault_named(scheme.options.buffer.fault)
    loses = options.overflow == "lost" or bool(fault & BufferFault.LOSS_IGNORED)
    late = bool(fault & BufferFault.LOGGED_LATE)
    return BufferSpec(options.records, options.combines, loses, late)


def compose_readers(
    scheme: Scheme,
    spec: FormatSpec,
    memory: MemoryManagement,
    traces: WriteTraces,
    buffers: Sequence[StoreLog],
) -> list[BufferReader]:
    """Return a reader for each CPU's guest write buffer; none for a scheme without."""
    if scheme.detect != "write-buffer":
        return []
    options = scheme.options
    fault = buffer_fault_named(options.buffer.fault)
    return [
        BufferReader(
            buffer, memory, traces, spec.entry_bytes, tell_all=options.tell_all, fault=fault
        )
        for buffer in buffers
    ]


def compose_sub_vmms(
    scheme: Scheme, spec: FormatSpec, memory: MemoryManagement, matrix: Matrix, traces: WriteTraces
) -> list[SecondaryData]:
    """Return one sub-VMM per VCPU; none for a scheme without shadow tables."""
    if scheme.shadow in ("none", "nested"):
        return []
    if scheme.shadow == "per-privilege":
        return list(compose_virtual_tlbs(scheme, spec, memory, matrix.n))
    shared = Shared(spec, scheme, memory, matrix, traces, _propagation(scheme, matrix))
    shared.company = Company() if scheme.shadow == "shared" else None
    return [SubVmm(i, shared) for i in range(matrix.n)]


def compose_virtual_tlbs(
    scheme: Scheme, spec: FormatSpec, memory: MemoryManagement, n: int
) -> list[VirtualTlb]:
    """Return one virtual TLB per VCPU: with storage of its own, or all on the VM's."""
    options, entries = scheme.options, Entries(spec, memory)
    regardless = "ET13" in options.errata
    common = options.sharing == "vm" or regardless

    def pairs() -> Pairs:
        n_tables = options.shadow_pages * (n if common else 1)
        storage = Storage(memory, n_tables, reuses_at_once="ET8" in options.errata)
        kept = options.working_set
        return Pairs(storage, entries, options.sharing, kept=kept, regardless=regardless)

    shared = pairs()
    return [VirtualTlb(State(i, entries, shared if common else pairs(), options)) for i in range(n)]


def compose_second_level(scheme: Scheme, memory: MemoryManagement) -> SecondLevel | None:
    """Return the second-level table of a VM, if its scheme has one."""
    return SecondLevel(memory) if scheme.shadow == "nested" else None


def monitor_frames(scheme: Scheme, n_vcpus: int, n_guest_frames: int) -> int:
    """Return how many machine frames a VM's monitor takes besides the guest's."""
    if scheme.shadow == "none":
        return 0
    if scheme.shadow == "nested":
        return frames_for(n_guest_frames)
    return (scheme.options.shadow_pages + 8) * n_vcpus


def order_named(names: str) -> Order:
    """Return the patch channel order for switch names joined by `+`; `correct` is none.

    Raises:
        ValueError: No such switch.
    """
    order = Order.CORRECT
    for name in names.split("+"):
        if name == "correct":
            continue
        if name not in SWITCHES:
            raise ValueError(f"no patch order switch {name!r}: see `penumbra list faults`")
        order |= SWITCHES[name].order
    return order


def _detection(scheme: Scheme) -> Detection:
    if scheme.detect != "write-buffer":
        return WriteProtect()
    options = scheme.options.buffer
    fault = buffer_fault_named(options.fault)
    return MarkForLog(everything=options.marks == "writable", fault=fault)


def _propagation(scheme: Scheme, matrix: Matrix) -> Propagation:
    return (
        PatchChannels(matrix, scheme.options)
        if scheme.propagate == "patch"
        else ImmediateShootdown()
    )
