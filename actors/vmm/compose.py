"""From a scheme to the sub-VMMs of one VM: the one place where policies become objects."""

from __future__ import annotations

from penumbra.actors.core import SWITCHES, Matrix, Order
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.nested import SecondLevel, frames_for
from penumbra.actors.vmm.parts import Shared
from penumbra.actors.vmm.propagate import ImmediateShootdown, PatchChannels, Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.secondary import SecondaryData
from penumbra.actors.vmm.subvmm import SubVmm
from penumbra.actors.vmm.traces import WriteTraces
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
    """Return one sub-VMM per VCPU; none for a scheme without shadow tables."""
    if scheme.shadow in ("none", "nested"):
        return []
    shared = Shared(spec, scheme, memory, matrix, traces, _propagation(scheme, matrix))
    return [SubVmm(i, shared) for i in range(matrix.n)]


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


def _propagation(scheme: Scheme, matrix: Matrix) -> Propagation:
    return PatchChannels(matrix) if scheme.propagate == "patch" else ImmediateShootdown()
