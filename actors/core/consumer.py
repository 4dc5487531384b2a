"""The consumer: a coherency event in, the entries to make coherent out.

    C1 event    read every producer's pending record; a covered one is a patch. Never wait for it
    C2          only now the bell row: a channel is looked at if its bell has moved since it was
                last looked at, or if patches were left in it
    C3          per slot in use: copy it (866), version before and after; torn = no derived value
    C4          not covered by the event (868): left in use, or its key to the private store (870)
    C5          in use := 0 (878, but before the primary entry is read)
    C6          [fence], once
    C7          the caller reads each primary entry
    C8 usable   the derived value, if the count stands and the entry is the one it came from; else
                the caller derives again, or invalidates (872-876)
    C9 settle   [fence]; the count again: True = write-protect what was installed

An event is a plain call, so it is a barrier: between it and the VCPU's next instruction the caller
does what the patches say and calls `settle`, and nothing else. Secondary data that is made anew by
a fault (Fig. 8) takes the same steps without patches: `begin_fill`, C7, C8, `settle`.

An event costs one read per producer of the pending and bell rows, and the patches present.

Departs from the text, which frees last (878): `docs/errata.md` EP1, switch `free_last`.

Source: A40 Fig. 12, steps 860-880; ¶128 for freeing at 866.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from itertools import compress
from operator import ne
from typing import Final

from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import NO_SLOT, Drained, Patch, Postpone
from penumbra.actors.core.ports import LOCAL, Ports
from penumbra.actors.core.slots import FIELDS, copy_new, copy_slot
from penumbra.actors.core.words import (
    COUNT,
    LOST,
    PENDING_WORDS,
    TAIL,
    VOID,
    Layout,
    Words,
    rows_of,
)

Covers = Callable[[int, int], bool]
"""covers(base, offset): must the event make this entry coherent?"""

EVERY_BIT: Final = (1 << 64) - 1

_BELL_CLEARED_LATE: Final = int(Order.BELL_CLEARED_LATE)
_BELL_FLAG: Final = int(Order.BELL_FLAG)
_BELL_PLAIN_CLEAR: Final = int(Order.BELL_PLAIN_CLEAR)
_BELL_READ_BEFORE_PENDING: Final = int(Order.BELL_READ_BEFORE_PENDING)
_FREE_LAST: Final = int(Order.FREE_LAST)
_LEFT_UNMARKED: Final = int(Order.LEFT_UNMARKED)
_NO_COUNT_CHECK: Final = int(Order.NO_COUNT_CHECK)
_NO_PENDING: Final = int(Order.NO_PENDING)
_NO_RECHECK: Final = int(Order.NO_RECHECK)
_NO_SOURCE_COMPARE: Final = int(Order.NO_SOURCE_COMPARE)
_PENDING_READ_LATE: Final = int(Order.PENDING_READ_LATE)
_RELINK_AS_IS: Final = int(Order.RELINK_AS_IS)


class Consumer:
    """One VCPU's consumer: a row of channels, one from each producer, its own included.

    Invariant: every patch in use stands in a slot that `left` names or that lies between the tail
    last seen and the tail; no slot freed is in `left`.
    """

    def __init__(
        self,
        words: Words,
        layout: Layout,
        index: int,
        *,
        ports: Ports = LOCAL,
        order: Order = Order.CORRECT,
        postpone: Postpone = Postpone.IN_CHANNEL,
    ) -> None:
        self.index = index
        self._words = words
        self._ports = ports
        self._order = int(order)
        self._to_store = postpone is Postpone.IN_STORE
        self._fence: Callable[[], None] | None = (
            None if ports is LOCAL or order & Order.NO_CONSUMER_FENCE else ports.fence
        )
        n = layout.n
        self._everyone = range(n)
        # Plain memory gives a row of words in one piece; the stepper's gives one load at a time.
        self._row: Callable[[slice], list[int]] | None = rows_of(words)
        self._pending_row = slice(layout.pending(0), layout.pending(n), PENDING_WORDS)
        self._bell_row = slice(layout.bell(0, index), layout.bell(0, index) + n)
        self._pending = [layout.pending(producer) for producer in range(n)]
        self._bells = [layout.bell(producer, index) for producer in range(n)]
        self._channels = [layout.channel(producer, index) for producer in range(n)]
        self._seen_bells = [0] * n
        self._seen_tails = [0] * n
        self._seen_losses = [0] * n
        self._left: list[dict[int, tuple[int, int]]] = [{} for _ in range(n)]
        self._store: dict[tuple[int, int], None] = {}
        self._owed: list[int] = []
        self._freed = False
        self._dropping = False
        self._count = 0
        self._applied = [0] * n
        self._stored = [0] * n
        self._dropped = [0] * n
        self._peaks = [0] * n

    def event(self, covers: Covers | None = None) -> Drained:
        """Take what a coherency event makes relevant out of the channels (C1-C6, C8's count).

        A patch that `covers` refuses waits for a later event. What is returned is in no channel any
        more: the caller makes it coherent before anything else runs here, or calls `mark_drop_all`.

        Args:
            covers: Which entries the event must make coherent; None = all there are.

        Source: A40 Fig. 12, steps 860-880.
        """
        order = self._order
        patches: list[Patch] = []
        if order & _BELL_READ_BEFORE_PENDING:
            rung = self._rung()
            self._read_pending(covers, patches)
        else:
            if not order & (_NO_PENDING | _PENDING_READ_LATE):
                self._read_pending(covers, patches)
            rung = self._rung()
        for producer in rung:  # 862
            self._look(producer, covers, patches)
        if order & _PENDING_READ_LATE:
            self._read_pending(covers, patches)
        if self._store:
            self._take_stored(covers, patches)
        dropping = self._dropping
        if dropping:
            self.drop_all()
            patches = []
        elif self._fence is not None and (patches or self._freed):
            self._fence()
        self._freed = False
        self._count = self._words[COUNT]
        return Drained(patches, dropping)

    def usable(self, patch: Patch, current: int, mask: int = EVERY_BIT) -> bool:
        """Say whether a patch's derived value may be installed now (C8).

        Args:
            current: The primary entry, read after `event` returned.
            mask: The bits of the entry that the derived value depends on (the accessed bit does not
                matter).

        Source: A40 ¶118; A40c 49, 64, 70.
        """
        order = self._order
        if patch.usefulness == VOID:
            return False
        if patch.usefulness != self._count and not order & _NO_COUNT_CHECK:
            return False
        return not (patch.source ^ current) & mask or bool(order & _NO_SOURCE_COMPARE)

    def begin_fill(self) -> int:
        """Read the trace count, before the primary entry is read; `settle` ends the fill."""
        self._count = count = self._words[COUNT]
        return count

    def settle(self) -> bool:
        """Say that the event's patches, or the fill, are installed (C9).

        True if a trace has been placed since the count was read: then what was installed writable
        must be write-protected before the VCPU runs. It matters only beside a trace placer that
        writes the copies itself; one that asks each VCPU is served between exits.
        """
        words = self._words
        for mark in self._owed:
            words[mark] = 0  # 878
        self._owed.clear()
        if self._order & _NO_RECHECK:
            return False
        if self._fence is not None:
            self._fence()
        return words[COUNT] != self._count

    def drain_base(self, base: int) -> Drained:
        """Take every patch for one table, because what is derived from it is to go."""
        return self.event(lambda patched, _: patched == base)

    def drain_bases(self, bases: Container[int]) -> Drained:
        """Take every patch for these tables, before what is derived from them is linked again.

        Departs from the text, which does not mention linking again: `docs/errata.md` EP7, switch
        `relink_as_is`.
        """
        if self._order & _RELINK_AS_IS:
            return Drained([])
        return self.event(lambda base, _: base in bases)

    @property
    def n_locks(self) -> int:
        """How often a channel has been locked: never where each has one producer."""
        return 0

    def mark_drop_all(self) -> None:
        """Make the next event drop everything: overflow met this consumer on the stack already."""
        self._dropping = True

    def drop_all(self) -> None:
        """Free every patch without reading it and forget the postponed ones.

        The caller drops all secondary data after this call, not before.
        """
        words = self._words
        for producer, (bell, header, _, marks, stride, capacity) in enumerate(self._channels):
            if not self._order & _BELL_FLAG:
                self._seen_bells[producer] = words[bell]
            self._seen_losses[producer] = words[header + LOST]
            self._seen_tails[producer] = words[header + TAIL]
            self._left[producer].clear()
            for k in range(capacity):
                if words[marks + k * stride]:
                    words[marks + k * stride] = 0
                    self._dropped[producer] += 1
        self._store.clear()
        self._owed.clear()
        self._freed = self._dropping = False
        if self._fence is not None:
            self._fence()

    @property
    def is_empty(self) -> bool:
        """True when no event could find anything: no patch waits, in a channel or in the store."""
        words = self._words
        return (
            not self._store
            and not self._dropping
            and not any(self._left)
            and not any(words[at] for at in self._pending)
            and [words[at] for at in self._bells] == self._seen_bells
        )

    @property
    def is_rung(self) -> bool:
        """True when a producer has told something since the last event; counter bells only."""
        return [self._words[at] for at in self._bells] != self._seen_bells

    @property
    def postponed(self) -> tuple[tuple[int, int], ...]:
        """The keys in the private store, oldest first."""
        return tuple(self._store)

    def tally(self, producer: int) -> tuple[int, int, int, int]:
        """Return the patches of one channel applied, stored and dropped, and its peak."""
        return (
            self._applied[producer],
            self._stored[producer],
            self._dropped[producer],
            self._peaks[producer],
        )

    def inherit(self, previous: Consumer) -> None:
        """Go on counting where the consumer that this one replaces stopped."""
        self._applied = previous._applied.copy()
        self._stored = previous._stored.copy()
        self._dropped = previous._dropped.copy()
        self._peaks = previous._peaks.copy()

    def check(self) -> None:
        words = self._words
        for producer, (_, header, _, marks, stride, capacity) in enumerate(self._channels):
            left = self._left[producer]
            tail, seen = words[header + TAIL], self._seen_tails[producer]
            unseen = {p % capacity for p in range(max(seen, tail - capacity), tail)}
            used = {k for k in range(capacity) if words[marks + k * stride]}
            assert left.keys() <= used, f"channel {producer}: slots {left.keys() - used} were freed"
            hidden = used - left.keys() - unseen
            assert not hidden, f"channel {producer}: no event will find slots {hidden}"

    def _read_pending(self, covers: Covers | None, patches: list[Patch]) -> None:
        """Treat each covered entry of a store in flight as a patch (C1).

        A record that changes while it is read belonged to a store whose patches have been rung
            since: C2 finds them. The store that replaced it began after this event.
        """
        words = self._words
        if self._row is not None and not any(self._row(self._pending_row)):
            return
        for producer, at in enumerate(self._pending):
            record = words[at]
            if not record:
                continue
            entries = [(words[word], words[word + 1]) for word in _entry_words(at, record & 3)]
            if words[at] != record:
                continue
            for base, offset in entries:
                if covers is None or covers(base, offset):
                    patches.append(Patch(base, offset, 0, 0, VOID, producer, NO_SLOT))

    def _rung(self) -> list[int]:
        """Return the producers whose channels must be looked at (C2)."""
        if self._order & _BELL_FLAG:
            return self._rung_by_flag()
        words, seen, left = self._words, self._seen_bells, self._left
        if self._row is not None:
            bells = self._row(self._bell_row)
            self._seen_bells = bells
            moved = list(compress(self._everyone, map(ne, bells, seen)))
            if not any(left):
                return moved
            return sorted({*moved, *compress(self._everyone, left)})
        rung = []
        for producer, at in enumerate(self._bells):
            bell = words[at]
            if bell != seen[producer]:
                seen[producer] = bell
                rung.append(producer)
            elif left[producer]:
                rung.append(producer)
        return rung

    def _rung_by_flag(self) -> list[int]:
        words, rung = self._words, []
        for producer, at in enumerate(self._bells):
            if words[at]:
                rung.append(producer)
                if self._order & _BELL_PLAIN_CLEAR:
                    words[at] = 0
                elif not self._order & _BELL_CLEARED_LATE:
                    self._ports.exchange(words, at, 0)
            elif self._left[producer]:
                rung.append(producer)
        return rung

    def _look(self, producer: int, covers: Covers | None, patches: list[Patch]) -> None:
        """Look through one channel (C3-C5)."""
        words, order, channel = self._words, self._order, self._channels[producer]
        bell, header, _, marks, stride, _ = channel
        left = self._left[producer]
        lost = words[header + LOST]
        if lost != self._seen_losses[producer]:
            self._seen_losses[producer] = lost
            self._dropping = True
        copies: list[int] = []
        for k, (base, offset) in left.items():
            if covers is None or covers(base, offset):
                copy_slot(words, channel, k, order, copies)
        n_known = len(copies)
        tail = words[header + TAIL]
        copy_new(words, channel, self._seen_tails[producer], tail, left, order, copies)
        self._seen_tails[producer] = tail
        present = len(left) + (len(copies) - n_known) // FIELDS
        if present > self._peaks[producer]:
            self._peaks[producer] = present
        fields = iter(copies)
        slots = zip(fields, fields, fields, fields, fields, fields, strict=True)
        if covers is None and not left and not order & _FREE_LAST:  # a CR3 load, nearly always
            before = len(patches)
            for k, base, offset, derived, source, usefulness in slots:
                patches.append(Patch(base, offset, derived, source, usefulness, producer, k))
                words[marks + k * stride] = 0  # 878
            self._freed |= len(patches) > before
            self._applied[producer] += len(patches) - before
        for at, (k, base, offset, derived, source, usefulness) in enumerate(slots):  # what is left
            if at * FIELDS < n_known or covers is None or covers(base, offset):  # 868
                patches.append(Patch(base, offset, derived, source, usefulness, producer, k))
                self._applied[producer] += 1
            elif self._to_store:
                self._store[base, offset] = None  # 870
                self._stored[producer] += 1
            else:
                if not order & _LEFT_UNMARKED:
                    left[k] = (base, offset)
                continue
            left.pop(k, None)
            self._free(marks + k * stride)
        if order & _BELL_CLEARED_LATE:
            self._ports.exchange(words, bell, 0)

    def _free(self, mark: int) -> None:
        if self._order & _FREE_LAST:
            self._owed.append(mark)
        else:
            self._words[mark] = 0  # 878
            self._freed = True

    def _take_stored(self, covers: Covers | None, patches: list[Patch]) -> None:
        """Turn the covered keys of the private store into patches without derived value."""
        for key in [key for key in self._store if covers is None or covers(*key)]:
            del self._store[key]
            patches.append(Patch(*key))


def _entry_words(at: int, n: int) -> range:
    return range(at + 1, at + 1 + 2 * n, 2)
