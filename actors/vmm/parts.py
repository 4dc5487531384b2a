"""What the pieces of one sub-VMM work on together, and what the sub-VMMs of one VM share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from penumbra.actors.core import Matrix
from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.propagate import Propagation
from penumbra.actors.vmm.schemes import Scheme
from penumbra.actors.vmm.shadow import NO_FRAGMENT, Role, ShadowPage, ShadowSpace
from penumbra.actors.vmm.shared_shadow import Company, SharedShadowSpace
from penumbra.actors.vmm.traces import WriteTraces
from penumbra.actors.vmm.unsync import UnsyncTables
from penumbra.actors.vmm.walk import GuestRegisters, Step
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
    company: Company | None = None  # who shares a shadow; None = nobody does
    unsync: UnsyncTables = field(init=False)

    def __post_init__(self) -> None:
        lifts = self.scheme.detect == "out-of-sync"
        self.unsync = UnsyncTables(self.traces, self.scheme.options.unsync if lifts else 0)


class Parts:
    """One VCPU's registers and shadow space, and the VM it belongs to.

    Attributes:
        filling: Guest entries that a fill under way is about to derive from: they stay registered,
            whatever is cleared on the way.
        sharers: The VCPUs that hear of what this one derives from: itself, or all of a company.
        sharer_bits: The same as a bit set.
        counts: What has happened since the last `take_counts`, by counter name.
    """

    def __init__(self, vcpu_id: int, shared: Shared) -> None:
        self.vcpu_id = vcpu_id
        self.shared = shared
        self.registers = GuestRegisters()
        self.filling: Sequence[Step] = ()
        self.counts: Counter[str] = Counter()
        company, n_pages = shared.company, shared.scheme.options.shadow_pages
        self.sharers: Sequence[int] = (vcpu_id,) if company is None else range(shared.matrix.n)
        self.sharer_bits = sum(1 << sharer for sharer in self.sharers)
        self.space = (
            ShadowSpace(shared.spec, shared.memory, n_pages, self.forget)
            if company is None
            else SharedShadowSpace(shared.spec, shared.memory, n_pages, self.forget, company)
        )

    def register(self, gfn: int, index: int) -> bool:
        """Note that this VCPU, and who shares its shadow, is about to derive from an entry.

        Returns:
            Whether that is news for one of them.
        """
        news = [self.shared.traces.register(gfn, index, vcpu_id) for vcpu_id in self.sharers]
        return any(news)

    def forget(self, gfn: int, index: int) -> None:
        """Note that nothing here derives from an entry any more, if that is so."""
        if any(step.gfn == gfn and step.place == index for step in self.filling):
            return
        if self.space.derives_elsewhere(gfn, index):
            return
        for vcpu_id in self.sharers:
            self.shared.traces.forget(gfn, index, vcpu_id)

    def role(self, gfn: int, level: int, gva: int) -> Role:
        """Return the role of the shadow of a guest table that translates `gva` at a level.

        Without sharing by role each place a table is linked at has a shadow of its own.
        """
        spec, root = self.shared.spec, self.space.root
        if self.shared.scheme.options.share_roles or level == spec.top or root is None:
            return (gfn, level, NO_FRAGMENT)
        return (gfn, level, NO_FRAGMENT, root.role[0], gva >> spec.levels[level + 1].shift)

    def shadow(self, role: Role) -> ShadowPage:
        """Return the shadow page of a role; a new one if there is none."""
        page = self.space.find(role)
        if page is None:
            page = self.space.create(role)
            self.shared.traces.note_shadow(role[0], self.vcpu_id, there=True)
            self.drop_traces()
        return page

    def drop_traces(self) -> None:
        """Give up the traces of tables whose last shadow has gone, at whichever VCPU that was.

        Not those that a fill under way has had traced to derive from, and none while shadows are
        shared: another VCPU's, in another mode, may derive from the table, too.
        """
        if self.shared.company is not None:
            self.space.take_emptied()
            return
        filling = {step.gfn for step in self.filling}
        for gfn in self.space.take_emptied():
            traces = self.shared.traces
            shadowed = bool(self.space.of_table(gfn))
            if not traces.note_shadow(gfn, self.vcpu_id, there=shadowed) and gfn not in filling:
                traces.remove(gfn)
                self.counts["trace_removed"] += 1

    def leaf_page(self, gva: int) -> ShadowPage | None:
        """Return the shadow of the leaf table that translates an address, if it is linked."""
        page = self.space.root
        while page is not None and page.level:
            page = page.children.get(self.shared.spec.levels[page.level].index(gva))
        return page if page is not None and page.role[2] == NO_FRAGMENT else None
