"""What the pieces of one sub-VMM work on together, and what the sub-VMMs of one VM share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penumbra.actors.core import Matrix
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.propagate import Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.shadow import ShadowSpace
from penumbra.actors.vmm.shared_shadow import Company, SharedShadowSpace
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.walk import GuestRegisters
from penumbra.hw.formats import PAGE_BYTES, FormatSpec

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
    company: Company | None = None  # who shares a shadow; None = nobody does


class Parts:
    """One VCPU's registers and shadow space, and the VM it belongs to.

    Attributes:
        filling: Guest entries that a fill under way is about to derive from: they stay registered,
            whatever is cleared on the way.
        sharers: The VCPUs that hear of what this one derives from: itself, or all of a company.
    """

    def __init__(self, vcpu_id: int, shared: Shared) -> None:
        self.vcpu_id = vcpu_id
        self.shared = shared
        self.registers = GuestRegisters()
        self.filling: frozenset[tuple[int, int]] = frozenset()
        company, n_pages = shared.company, shared.scheme.options.shadow_pages
        self.sharers: Sequence[int] = (vcpu_id,) if company is None else range(shared.matrix.n)
        self.space = (
            ShadowSpace(shared.spec, shared.memory, n_pages, self._gone)
            if company is None
            else SharedShadowSpace(shared.spec, shared.memory, n_pages, self._gone, company)
        )

    def register(self, gfn: int, index: int) -> None:
        """Note that this VCPU, and who shares its shadow, is about to derive from an entry."""
        for vcpu_id in self.sharers:
            self.shared.traces.register(gfn, index, vcpu_id)

    def _gone(self, gfn: int, index: int) -> None:
        if (gfn, index) in self.filling or self.space.derives_elsewhere(gfn, index):
            return
        for vcpu_id in self.sharers:
            self.shared.traces.forget(gfn, index, vcpu_id)

    def index(self, gpa: int) -> int:
        """Return the index of the entry at a guest-physical address."""
        return (gpa & (PAGE_BYTES - 1)) // self.shared.spec.entry_bytes
