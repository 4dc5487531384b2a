"""The steps that touch slots, as functions over words and the caller's own lists and dicts.

Integers in, integers out, so that one source serves a memoryview, shared memory, the stepper and,
compiled, a kernel. `post` is the producer's side, `copy_slot` and `copy_new` the consumer's; either
may run while the other does. What a post does that coalesces is written out in one piece: it is the
price of most stores.

Source: A40 Fig. 11, steps 836-842; Fig. 12, step 866; ¶120.
"""

from __future__ import annotations

from typing import Final

from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import Outcome
from penumbra.actors.core.words import (
    BASE,
    DERIVED,
    OFFSET,
    SLOT_WORDS,
    SOURCE,
    TAIL,
    USEFULNESS,
    VERSION,
    VOID,
    Channel,
    Words,
)

_BELL_FLAG: Final = int(Order.BELL_FLAG)
_IN_USE_FIRST: Final = int(Order.IN_USE_FIRST)
_NO_COALESCING: Final = int(Order.NO_COALESCING)
_NO_VERSION: Final = int(Order.NO_VERSION)
_RING_EARLY: Final = int(Order.RING_EARLY)
_VOID_ON_COALESCE: Final = int(Order.VOID_ON_COALESCE)
_UNVERSIONED: Final = _NO_VERSION | _VOID_ON_COALESCE

_POSTED: Final = int(Outcome.POSTED)
_COALESCED: Final = int(Outcome.COALESCED)
_FULL: Final = int(Outcome.FULL)

FIELDS: Final = 6
"""How many integers a copied slot is: number, base, offset, derived, source, usefulness."""


def ring(words: Words, bell: int, order: int) -> None:
    """Call the consumer's attention to a channel, after what it shall find there (P7)."""
    words[bell] = 1 if order & _BELL_FLAG else words[bell] + 1


def coalesce_unversioned(
    words: Words, slot: int, derived: int, source: int, usefulness: int, order: int
) -> None:
    """Rewrite a patch as orders do that have no version, or void it (P5)."""
    words[slot + USEFULNESS] = VOID
    if not order & _VOID_ON_COALESCE:
        words[slot + DERIVED] = derived
        words[slot + SOURCE] = source
        words[slot + USEFULNESS] = usefulness


def coalesce(
    words: Words, slot: int, derived: int, source: int, usefulness: int, order: int
) -> None:
    """Rewrite what was derived, in a patch the consumer may be reading (P5): as `post` does it."""
    if order & _UNVERSIONED:
        coalesce_unversioned(words, slot, derived, source, usefulness, order)
        return
    odd = words[slot + VERSION] | 1
    words[slot + VERSION] = odd
    words[slot + DERIVED] = derived
    words[slot + SOURCE] = source
    words[slot + USEFULNESS] = usefulness
    words[slot + VERSION] = odd + 1


def post(
    words: Words,
    channel: Channel,
    hint: dict[tuple[int, int], int],
    keys: list[tuple[int, int]],
    base: int,
    offset: int,
    derived: int,
    source: int,
    usefulness: int,
    order: int,
) -> int:
    """Post one changed entry into one channel: the code of an `Outcome`; FULL has written nothing.

    `keys` says what each slot was last used for, `hint` is its inverse. Both are this producer's
    own and may have forgotten everything: a second patch for an entry does no harm.

    Source: A40 Fig. 11, steps 836-842.
    """
    bell, header, slots, marks, stride, capacity = channel
    key = (base, offset)
    k = hint.get(key, -1)
    if k >= 0 and words[marks + k * stride]:  # 836
        slot = slots + k * SLOT_WORDS
        if order & _UNVERSIONED:
            coalesce_unversioned(words, slot, derived, source, usefulness, order)
        else:  # 837, while the consumer may be reading
            odd = words[slot + VERSION] | 1  # a dead producer may have left it odd
            words[slot + VERSION] = odd
            words[slot + DERIVED] = derived
            words[slot + SOURCE] = source
            words[slot + USEFULNESS] = usefulness
            words[slot + VERSION] = odd + 1
        words[bell] = 1 if order & _BELL_FLAG else words[bell] + 1
        return _COALESCED
    tail = words[header + TAIL]
    k = tail % capacity
    last = tail + capacity
    while words[marks + k * stride]:  # 838
        tail += 1
        if tail == last:
            return _FULL
        k = tail % capacity
    mark, slot = marks + k * stride, slots + k * SLOT_WORDS
    in_use = base + 1 if mark == slot + BASE else 1
    if order & _IN_USE_FIRST:
        words[mark] = in_use
        words[header + TAIL] = tail + 1
        ring(words, bell, order)
    if mark != slot + BASE:
        words[slot + BASE] = base  # 840
    words[slot + OFFSET] = offset
    words[slot + DERIVED] = derived
    words[slot + SOURCE] = source
    words[slot + USEFULNESS] = usefulness
    if order & _RING_EARLY:
        words[header + TAIL] = tail + 1
        ring(words, bell, order)
    words[mark] = in_use  # 842
    words[header + TAIL] = tail + 1
    ring(words, bell, order)
    if not order & _NO_COALESCING:
        if hint.get(keys[k], -1) == k:
            del hint[keys[k]]
        keys[k] = key
        hint[key] = k
    return _POSTED


def copy_slot(words: Words, channel: Channel, k: int, order: int, out: list[int]) -> None:
    """Append slot `k`: number, base, offset, derived, source, usefulness; torn = usefulness 0 (C3).

    Source: A40 Fig. 12, step 866.
    """
    _, _, slots, marks, stride, _ = channel
    mark, slot = marks + k * stride, slots + k * SLOT_WORDS
    version = words[slot + VERSION]
    base = words[mark] - 1 if mark == slot + BASE else words[slot + BASE]
    offset = words[slot + OFFSET]
    derived = words[slot + DERIVED]
    source = words[slot + SOURCE]
    usefulness = words[slot + USEFULNESS]
    if not order & _NO_VERSION and (version & 1 or words[slot + VERSION] != version):
        usefulness = VOID
    out.extend((k, base, offset, derived, source, usefulness))


def copy_new(
    words: Words,
    channel: Channel,
    seen: int,
    tail: int,
    left: dict[int, tuple[int, int]],
    order: int,
    out: list[int],
) -> None:
    """Append the slots in use among those the producer has passed between `seen` and `tail` (864).

    Slots in `left` are known already: the producer only stepped over them.
    """
    _, _, _, marks, stride, capacity = channel
    for position in range(max(seen, tail - capacity), tail):
        k = position % capacity
        if k not in left and words[marks + k * stride]:
            copy_slot(words, channel, k, order, out)
