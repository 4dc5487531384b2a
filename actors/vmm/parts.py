"""What the pieces of one sub-VMM work on together, and what the sub-VMMs of one VM share."""

from __future__ import annotations

from dataclasses import dataclass, field

from penumbra.actors.core import Matrix
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.propagate import Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.shadow import ShadowSpace
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.formats import FormatSpec

# Stands for the table that a guest without paging does not have: every address is physical.
UNPAGED = -2


@dataclass
class Shared:
    """What the sub-VMMs of one VM share."""

    spec: FormatSpec
    scheme: Scheme
    memory: MemoryManagement
    matrix: Matrix
    traces: WriteTraces
    propagation: Propagation
    roots: dict[int, int] = field(default_factory=dict)  # vcpu_id to the root's guest frame


class Parts:
    """One VCPU's registers and shadow space, and the VM it belongs to.

    Attributes:
        filling: Guest entries that a fill under way is about to derive from: they stay registered,
            whatever is cleared on the way.
    """

    def __init__(self, vcpu_id: int, shared: Shared) -> None:
        self.vcpu_id = vcpu_id
        self.shared = shared
        self.registers = GuestRegisters()
        self.filling: frozenset[tuple[int, int]] = frozenset()
        self.space = ShadowSpace(
            shared.spec, shared.memory, shared.scheme.options.shadow_pages, self._gone
        )

    def _gone(self, gfn: int, index: int) -> None:
        if (gfn, index) not in self.filling:
            self.shared.traces.forget(gfn, index, self.vcpu_id)
