"""From a scheme to the sub-VMMs of one VM: the one place where policies become objects."""

from __future__ import annotations

from penumbra.actors.core import SWITCHES, Channels, InUse, Matrix, Order, Postpone
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.parts import Shared
from penumbra.actors.vmm.propagate import ImmediateShootdown, PatchChannels, Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.secondary import SecondaryData
from penumbra.actors.vmm.shared_shadow import Company
from penumbra.actors.vmm.subvmm import SubVmm
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.hw.formats import FormatSpec

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


def compose_sub_vmms(
    scheme: Scheme, spec: FormatSpec, memory: MemoryManagement, matrix: Matrix, traces: WriteTraces
) -> list[SecondaryData]:
    """Return one sub-VMM per VCPU; none for a scheme without a monitor."""
    if scheme.shadow == "none":
        return []
    shared = Shared(spec, scheme, memory, matrix, traces, _propagation(scheme, matrix))
    shared.company = Company() if scheme.shadow == "shared" else None
    return [SubVmm(i, shared) for i in range(matrix.n)]


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
    return (
        PatchChannels(matrix, scheme.options)
        if scheme.propagate == "patch"
        else ImmediateShootdown()
    )
