"""From a scheme to the sub-VMMs of one VM: the one place where policies become objects."""

from __future__ import annotations

from penumbra.actors.core import SWITCHES, Matrix, Order
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.parts import Shared
from penumbra.actors.vmm.propagate import ImmediateShootdown, PatchChannels, Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.secondary import SecondaryData
from penumbra.actors.vmm.subvmm import SubVmm
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.vtlb.entries import Entries
from penumbra.actors.vmm.vtlb.sharing import Pairs
from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import Storage
from penumbra.actors.vmm.vtlb.virtual_tlb import VirtualTlb
from penumbra.hw.formats import FormatSpec


def compose_matrix(scheme: Scheme, n: int) -> Matrix:
    """Return the channels of `n` VCPUs as the scheme's options have them.

    Raises:
        ValueError: No such step order.
    """
    return Matrix(n, scheme.options.capacity, order=order_named(scheme.options.order))


def compose_sub_vmms(
    scheme: Scheme, spec: FormatSpec, memory: MemoryManagement, matrix: Matrix, traces: WriteTraces
) -> list[SecondaryData]:
    """Return one sub-VMM per VCPU; none for a scheme without a monitor."""
    if scheme.shadow == "none":
        return []
    if scheme.shadow == "per-privilege":
        return list(compose_virtual_tlbs(scheme, spec, memory, matrix.n))
    shared = Shared(spec, scheme, memory, matrix, traces, _propagation(scheme, matrix))
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


def _propagation(scheme: Scheme, matrix: Matrix) -> Propagation:
    return PatchChannels(matrix) if scheme.propagate == "patch" else ImmediateShootdown()
