"""Both sides of a channel with a mutual exclusion lock, whoever shares it.

The lock makes the order inside a channel of no account, so the scans are the text's own, 836 and
838 in one pass and 864, over the slots in use. What it does not replace: `pending` (a store is
visible before any lock is taken), the source and count comparisons, and freeing before the entry
is read, unless the lock is held until the entry is installed: with `Order.FREE_LAST` it is, and
the printed order of Fig. 12 is right.

Nobody asks another CPU for anything with a lock held, and a consumer takes each lock once per event
and in one direction, so no lock can close a circle.

Source: A40 ¶58, ¶120, ¶127.
"""

from __future__ import annotations

from collections.abc import Iterator

from penumbra.actors.core.consumer import Consumer, Covers
from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import Outcome, Patch, Postpone
from penumbra.actors.core.ports import LOCAL, Ports
from penumbra.actors.core.producer import Producer
from penumbra.actors.core.slots import ring
from penumbra.actors.core.topology import LOCK, POSTER, TOP, LockedLayout
from penumbra.actors.core.words import (
    BASE,
    DERIVED,
    HEADER_WORDS,
    IN_USE,
    OFFSET,
    SLOT_WORDS,
    SOURCE,
    USEFULNESS,
    VOID,
    Words,
)

_FREE_LAST = int(Order.FREE_LAST)
_NO_CHANNEL_LOCK = int(Order.NO_CHANNEL_LOCK)
_NO_COALESCING = int(Order.NO_COALESCING)
_VOID_ON_COALESCE = int(Order.VOID_ON_COALESCE)


class LockedProducer(Producer):
    """One VCPU's producer over channels that have locks."""

    def __init__(
        self,
        words: Words,
        layout: LockedLayout,
        index: int,
        *,
        ports: Ports = LOCAL,
        order: Order = Order.CORRECT,
    ) -> None:
        super().__init__(words, layout, index, ports=ports, order=order)
        self._channels = [end.channel for end in self._ends]
        self._tallies = [end.tally for end in self._ends]
        self._layout = layout
        self._ports = ports
        self._n_locks = 0

    @property
    def n_locks(self) -> int:
        return self._n_locks

    def inherit(self, previous: Producer) -> None:
        super().inherit(previous)
        self._n_locks = previous.n_locks

    def post_nowait(
        self, consumer: int, base: int, offset: int, derived: int | None = None, source: int = 0
    ) -> Outcome:
        full, coalesced = self._post(1 << consumer, base, offset, derived, source)
        return Outcome.FULL if full else Outcome.COALESCED if coalesced else Outcome.POSTED

    def post_all(
        self, consumers: int, base: int, offset: int, derived: int | None = None, source: int = 0
    ) -> int:
        full = 0
        for members in self._sharers(consumers):
            full |= self._post(members, base, offset, derived, source)[0]
        return full

    def blockers(self, consumers: int) -> int:
        words, blocking = self._words, consumers
        for members in self._sharers(consumers):
            header = self._layout.header(self.index, members.bit_length() - 1)
            self._lock(header)
            for slot in slots_in_use(words, header):
                blocking |= words[slot + IN_USE]
            self._unlock(header)
        return blocking

    def _sharers(self, consumers: int) -> Iterator[int]:
        """Split a bit set of consumers by the channel they are told through."""
        by_channel: dict[int, int] = {}
        while consumers:
            bit = consumers & -consumers
            consumers ^= bit
            number = self._layout.number(self.index, bit.bit_length() - 1)
            by_channel[number] = by_channel.get(number, 0) | bit
        yield from by_channel.values()

    def _post(
        self, members: int, base: int, offset: int, derived: int | None, source: int
    ) -> tuple[int, int]:
        """Post to consumers of one channel; return those it is full for, those that coalesced."""
        self._check_stored()
        words = self._words
        header = self._layout.header(self.index, members.bit_length() - 1)
        self._lock(header)
        slot, mask = self._find(header, base, offset)
        if slot:
            words[slot + POSTER] = self.index
            words[slot + BASE] = base  # 840
            words[slot + OFFSET] = offset
            if derived is None or (mask and self._order & _VOID_ON_COALESCE):
                words[slot + USEFULNESS] = VOID
            else:
                words[slot + DERIVED] = derived  # 837
                words[slot + SOURCE] = source
                words[slot + USEFULNESS] = self._count
            words[slot + IN_USE] = mask | members  # 842
        self._unlock(header)
        if not slot:
            self._note(members, Outcome.FULL)
            return members, 0
        self._note(members & ~mask, Outcome.POSTED)
        self._note(members & mask, Outcome.COALESCED)
        return 0, members & mask

    def _find(self, header: int, base: int, offset: int) -> tuple[int, int]:
        """Return the slot to write, 0 if there is none, and who has still to take what is there."""
        words, free = self._words, 0
        first, top = header + HEADER_WORDS, words[header + TOP]
        for slot in range(first, first + top * SLOT_WORDS, SLOT_WORDS):
            mask = words[slot + IN_USE]
            if not mask:
                free = free or slot
            elif (
                words[slot + BASE] == base
                and words[slot + OFFSET] == offset
                and not self._order & _NO_COALESCING
            ):
                return slot, mask  # 836
        if not free and top < self._layout.capacity:  # 838
            free = first + top * SLOT_WORDS
            words[header + TOP] = top + 1
        return free, 0

    def _note(self, members: int, outcome: Outcome) -> None:
        for consumer, tally in enumerate(self._tallies):
            if members >> consumer & 1:
                tally[outcome] += 1
                if outcome is not Outcome.FULL:
                    ring(self._words, self._channels[consumer][0], self._order)

    def _lock(self, header: int) -> None:
        if not self._order & _NO_CHANNEL_LOCK:
            self._ports.lock(self._words, header + LOCK)
            self._n_locks += 1

    def _unlock(self, header: int) -> None:
        if not self._order & _NO_CHANNEL_LOCK:
            self._ports.unlock(self._words, header + LOCK)


class LockedConsumer(Consumer):
    """One VCPU's consumer over channels that have locks.

    Channels are looked at under the number of the first producer that uses them.

    Invariant: between events no lock is held; every patch this consumer has still to take lies
    below `top` in a channel whose bell has moved, or that has keys in `_left`.
    """

    def __init__(
        self,
        words: Words,
        layout: LockedLayout,
        index: int,
        *,
        ports: Ports = LOCAL,
        order: Order = Order.CORRECT,
        postpone: Postpone = Postpone.IN_CHANNEL,
    ) -> None:
        super().__init__(words, layout, index, ports=ports, order=order, postpone=postpone)
        n = layout.n
        self._bit = 1 << index
        self._headers = [layout.header(producer, index) for producer in range(n)]
        self._first = [self._headers.index(header) for header in self._headers]
        self._losses = [layout.lost(producer, index) for producer in range(n)]
        self._held: list[int] = []
        self._n_locks = 0

    @property
    def n_locks(self) -> int:
        return self._n_locks

    def inherit(self, previous: Consumer) -> None:
        super().inherit(previous)
        self._n_locks = previous.n_locks

    def settle(self) -> bool:
        self._settle_owed()
        return super().settle()

    def drop_all(self) -> None:
        self._owed.clear()
        self._settle_owed()
        words = self._words
        for producer, at in enumerate(self._bells):
            self._seen_bells[producer] = words[at]
            self._seen_losses[producer] = words[self._losses[producer]]
            self._left[producer].clear()
        for producer in sorted(set(self._first)):
            header = self._headers[producer]
            self._lock(header)
            for slot in slots_in_use(words, header):
                if words[slot + IN_USE] & self._bit:
                    words[slot + IN_USE] = words[slot + IN_USE] & ~self._bit
                    self._dropped[words[slot + POSTER]] += 1
            self._unlock(header)
        self._store.clear()
        self._freed = self._dropping = False
        if self._fence is not None:
            self._fence()

    def check(self) -> None:
        words = self._words
        for producer in sorted(set(self._first)):
            header = self._headers[producer]
            assert not words[header + LOCK], f"the lock at {header} is held between exits"
            mine = [s for s in slots_in_use(words, header) if words[s + IN_USE] & self._bit]
            keys = {(words[slot + BASE], words[slot + OFFSET]) for slot in mine}
            sharers = [p for p, first in enumerate(self._first) if first == producer]
            rung = any(words[self._bells[p]] != self._seen_bells[p] for p in sharers)
            left = set(self._left[producer].values())
            assert left <= keys, f"channel {producer}: {left - keys} were taken"
            assert rung or keys == left, f"channel {producer}: no event will find {keys - left}"

    def _rung(self) -> list[int]:
        return sorted({self._first[producer] for producer in super()._rung()})

    def _look(self, producer: int, covers: Covers | None, patches: list[Patch]) -> None:
        """Look through one channel (C3-C5), with its lock held."""
        words, header = self._words, self._headers[producer]
        self._note_losses()
        self._lock(header)
        left = self._left[producer]
        left.clear()
        present = top = 0
        for slot in slots_in_use(words, header):
            mask = words[slot + IN_USE]
            if mask & self._bit:
                present += 1
                if self._take(slot, covers, patches):
                    mask = self._free_slot(slot, mask)
                else:
                    left[slot] = (words[slot + BASE], words[slot + OFFSET])
            if mask:
                top = slot
        words[header + TOP] = (top - header - HEADER_WORDS) // SLOT_WORDS + 1 if top else 0
        self._peaks[producer] = max(self._peaks[producer], present)
        if self._order & _FREE_LAST:
            self._held.append(header)
        else:
            self._unlock(header)

    def _take(self, slot: int, covers: Covers | None, patches: list[Patch]) -> bool:
        """Copy a patch (866), for now or for later (868, 870); False leaves it in its slot."""
        words = self._words
        base, offset, poster = words[slot + BASE], words[slot + OFFSET], words[slot + POSTER]
        if covers is None or covers(base, offset):  # 868
            derived, source = words[slot + DERIVED], words[slot + SOURCE]
            used = words[slot + USEFULNESS]
            patches.append(Patch(base, offset, derived, source, used, poster, slot))
            self._applied[poster] += 1
        elif self._to_store:
            self._store[base, offset] = None  # 870
            self._stored[poster] += 1
        else:
            return False
        return True

    def _free_slot(self, slot: int, mask: int) -> int:
        """Take this consumer's bit away (878); return what is left of the slot's."""
        if self._order & _FREE_LAST:
            self._owed.append(slot + IN_USE)
            return mask
        self._words[slot + IN_USE] = mask & ~self._bit  # 878
        self._freed = True
        return mask & ~self._bit

    def _settle_owed(self) -> None:
        words = self._words
        for mark in self._owed:
            words[mark] = words[mark] & ~self._bit  # 878
        self._owed.clear()
        for header in self._held:
            self._unlock(header)
        self._held.clear()

    def _note_losses(self) -> None:
        for producer, at in enumerate(self._losses):
            lost = self._words[at]
            if lost != self._seen_losses[producer]:
                self._seen_losses[producer] = lost
                self._dropping = True

    def _lock(self, header: int) -> None:
        if not self._order & _NO_CHANNEL_LOCK:
            self._ports.lock(self._words, header + LOCK)
            self._n_locks += 1

    def _unlock(self, header: int) -> None:
        if not self._order & _NO_CHANNEL_LOCK:
            self._ports.unlock(self._words, header + LOCK)


def slots_in_use(words: Words, header: int) -> Iterator[int]:
    """Return the slots of a channel that anybody has still to take; the lock must be held."""
    first = header + HEADER_WORDS
    for slot in range(first, first + words[header + TOP] * SLOT_WORDS, SLOT_WORDS):
        if words[slot + IN_USE]:
            yield slot
