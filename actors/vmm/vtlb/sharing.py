"""Whose active hierarchies there are: per VCPU, per VM, or one storage for all VMs in turn.

Always a pair, one hierarchy for each set of privilege levels that pages can tell apart. Per VCPU
needs no further protocol: what a VCPU has loaded is its own, as a TLB is. VCPUs of a VM may share
a pair only while they have the same root and the same modes, for an entry means the same to them
only then; what one of them drops is dropped for all, which is legal, and whoever joins or reloads
CR3 empties the pair, because nothing older than its event may serve it.

VMs may share storage, not content: it is emptied when another VM enters, and never live for two.

Source: VTLBc 11, 12, 22, 23, 26, 27; method 400, block 406; field notes ET13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from penumbra.actors.vmm.vtlb.entries import Entries, Mode
from penumbra.actors.vmm.vtlb.tables import Hierarchy, Storage

Sharing: TypeAlias = Literal["vcpu", "vm"]
Key: TypeAlias = tuple[object, ...]


class Pair:
    """The active user and the active supervisor hierarchy.

    Attributes:
        key: What its users have in common.
        users: Bit set of the VCPUs that run on it.
    """

    def __init__(self, storage: Storage, entries: Entries, key: Key) -> None:
        self.key = key
        self.users = 0
        self.user = Hierarchy(storage, entries, user=True)
        self.supervisor = Hierarchy(storage, entries, user=False)
        self.both = (self.user, self.supervisor)

    def of(self, user: bool) -> Hierarchy:
        """Return the hierarchy of a privilege (706)."""
        return self.user if user else self.supervisor

    def others(self, vcpu_id: int) -> int:
        """Return the bit set of the VCPUs that use this pair beside one."""
        return self.users & ~(1 << vcpu_id)

    def empty(self, vcpu_id: int) -> None:
        """Drop every active entry: all of the TLB's content is gone."""
        for hierarchy in self.both:
            hierarchy.empty(self.others(vcpu_id))

    def check(self) -> None:
        for hierarchy in self.both:
            hierarchy.check()


@dataclass(frozen=True)
class Use:
    """What of a VCPU decides which pair it may run on.

    Attributes:
        top: Entries of the top level that its guest's CPU holds in registers; equal roots may have
            been loaded at different times.
    """

    vcpu_id: int
    root: int
    mode: Mode
    top: tuple[int, ...] = ()


class Pairs:
    """All pairs of one VM.

    Invariant: a pair has users, all of one key, or is kept for the VCPU that left it; without
    sharing the key is the VCPU, with a working set its root and mode as well.
    """

    def __init__(
        self,
        storage: Storage,
        entries: Entries,
        sharing: Sharing,
        *,
        kept: int = 0,
        regardless: bool = False,
    ) -> None:
        """Start with none.

        Args:
            kept: So many pairs that nobody runs on are kept, the last used ones (a working set).
            regardless: ET13 as printed: one pair per VM, whatever roots and modes its VCPUs have.
        """
        self._n_kept = kept
        self.storage = storage
        self._entries = entries
        self._sharing = sharing
        self._regardless = regardless
        self._pairs: dict[Key, Pair] = {}
        self._of: dict[int, Pair] = {}

    def key(self, use: Use) -> Key:
        if self._regardless:
            return ()
        if self._sharing == "vm":
            return (use.root, use.mode, use.top)
        return (use.vcpu_id, use.root, use.mode) if self._n_kept else (use.vcpu_id,)

    def join(self, use: Use) -> Pair:
        """Return the pair a VCPU runs on from now on; a pair it leaves is freed or kept.

        Raises:
            MonitorMemoryShortError: No frame is left for a new pair, even with none kept.
        """
        key, bit = self.key(use), 1 << use.vcpu_id
        before, after = self._of.get(use.vcpu_id), self._pairs.get(key)
        if before is not None and before is after:
            return before
        if after is not None:
            after.users |= bit  # before the other one is left: it must not be forgotten
        if before is not None:
            self.leave(use.vcpu_id)
        if after is None:
            if self.storage.n_left < 2:
                self.forget(0)
            after = self._pairs[key] = Pair(self.storage, self._entries, key)
            after.users |= bit
        self._of[use.vcpu_id] = after
        return after

    def leave(self, vcpu_id: int) -> None:
        """A VCPU runs on its pair no more: its CPU flushes before it runs again."""
        pair = self._of.pop(vcpu_id)
        pair.users &= ~(1 << vcpu_id)
        self._pairs[pair.key] = self._pairs.pop(pair.key)  # the last used one comes last
        self.forget(self._n_kept)

    def forget(self, n_kept: int) -> None:
        """Free pairs that nobody runs on, until so many are left."""
        idle = [pair for pair in self._pairs.values() if not pair.users]
        for pair in idle[: max(0, len(idle) - n_kept)]:
            del self._pairs[pair.key]
            for hierarchy in pair.both:
                hierarchy.release(0)

    def all(self) -> list[Pair]:
        return list(self._pairs.values())

    @property
    def shared(self) -> bool:
        """Whether VCPUs may run on a pair together."""
        return self._regardless or self._sharing == "vm"

    def used_by(self, vcpu_id: int) -> list[Pair]:
        """Return the pairs a VCPU runs on or may come back to."""
        return [pair for key, pair in self._pairs.items() if self.shared or key[0] == vcpu_id]

    def n_tables(self) -> int:
        """Return how many active tables there are, roots included."""
        return sum(hierarchy.n_tables for pair in self.all() for hierarchy in pair.both)

    def is_empty(self) -> bool:
        """Tell whether nothing is loaded: roots alone are left, all invalid (VTLBc 10)."""
        return not any(h.root.origin for pair in self.all() for h in pair.both)

    def check(self) -> None:
        for key, pair in self._pairs.items():
            assert key == pair.key
            pair.check()
        idle = sum(not pair.users for pair in self._pairs.values())
        assert idle <= self._n_kept, "a pair nobody uses"
        frames = [t.pfn for pair in self.all() for h in pair.both for t in h.tables()]
        assert len(frames) == len(set(frames)) == self.n_tables(), "a frame serves two tables"


class TurnTaking:
    """One storage for the active tables of several VMs: whoever enters finds it empty.

    Invariant: only the pairs of `owner` hold anything.

    Source: VTLB method 400, block 406, "two or more virtual machines may share"; requirement I11.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._members: dict[int, Pairs] = {}
        self.owner: int | None = None

    def add(self, vm: int, pairs: Pairs) -> None:
        """Let a VM take its turns; its pairs must be on this storage and empty."""
        assert pairs.storage is self._storage and pairs.is_empty()
        self._members[vm] = pairs

    def enter(self, vm: int) -> None:
        """A VM runs next: what another has loaded goes. Every CPU flushes at a world switch.

        Raises:
            KeyError: No such VM; nothing was changed.
        """
        if vm not in self._members:
            raise KeyError(vm)
        for other, pairs in self._members.items():
            if other != vm:
                for pair in pairs.all():
                    for hierarchy in pair.both:
                        hierarchy.empty(0)
        self.owner = vm

    def check(self) -> None:
        for vm, pairs in self._members.items():
            pairs.check()
            assert vm == self.owner or pairs.is_empty(), f"VM {vm} has entries out of its turn"
        n = sum(pairs.n_tables() for pairs in self._members.values())
        assert n == self._storage.n_used, "a table belongs to no VM"
