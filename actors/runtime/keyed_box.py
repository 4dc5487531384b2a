"""A box that coalesces: what a `Coalesce` policy makes of one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from .box import ACCEPTED, COALESCED, FULL, Box, Outcome, Settle

T = TypeVar("T")


class KeyedBox(Box[T]):
    """A box in which an item takes the place of a queued one with the same key.

    Invariant: `_places` holds, by key, the number of an entry after the last fence; the entry is
    queued if its number is not below `_n_left`, then at that distance from the front.

    Args:
        key: None: the item has no key and is a fence.
    """

    def __init__(
        self,
        name: str,
        bound: int,
        key: Callable[[T], Hashable | None],
        settle: Settle | None = None,
    ) -> None:
        super().__init__(name, bound, settle)
        self._key = key
        self._places: dict[Hashable, int] = {}
        self._n_left = 0  # how many entries have left the user lane by its front
        self._n_since_turn = 0
        self.room = 0  # nobody takes the fast path past the keys

    def put_nowait(self, item: T) -> Outcome:
        self._refuse_if_closed()
        key = self._key(item)
        if key is not None:
            place = self._places.get(key, -1) - self._n_left
            if place >= 0:
                self.items[place] = item
                self._coalesced += 1
                return COALESCED
        if len(self.items) >= self.bound:
            return FULL
        self._append(item, key)
        if self.wake is not None:
            self.rouse()
        return ACCEPTED

    async def put(self, item: T) -> None:
        """As `Box.put`, but with a checkpoint once per `bound` calls only."""
        if self._n_since_turn < self.bound and self.put_nowait(item) is not FULL:
            self._n_since_turn += 1
        else:
            await super().put(item)

    def take_all(self) -> list[T]:
        self._places.clear()
        self._n_left += len(self.items)
        return super().take_all()

    def take_one(self) -> T:
        if not self.control:
            self._n_left += 1
        return super().take_one()

    def hand_back(self, rest: list[T]) -> None:
        self._n_left -= len(rest)
        super().hand_back(rest)

    def withdraw(self, unwanted: Callable[[T], bool]) -> list[T]:
        self._places.clear()  # the places are no longer what they were
        return super().withdraw(unwanted)

    def check(self) -> None:
        super().check()
        for key, number in self._places.items():
            place = number - self._n_left
            assert place < len(self.items)
            assert place < 0 or self._key(self.items[place]) == key

    def _queue(self, item: T) -> None:
        # A sender that waited: meanwhile somebody else may have queued something of its key.
        key = self._key(item)
        place = -1 if key is None else self._places.get(key, -1) - self._n_left
        if place >= 0:
            self.items[place] = item
            self._coalesced += 1
        else:
            self._append(item, key)

    def _append(self, item: T, key: Hashable | None) -> None:
        if key is None:
            self._places.clear()
        else:
            self._places[key] = self._n_left + len(self.items)
        self.items.append(item)

    def _loop_turned(self) -> None:
        self.room = 0
        self._n_since_turn = 0
