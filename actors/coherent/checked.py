"""The oracle of a fabric: every read compared with what the primary data gives.

    async with checked(fabric) as checker:
        ...                               # the test; each wrong answer raises StaleRead
    assert checker.n_checked

The checker shares neither channels nor copies with what it judges: it keeps the history of each
source, and derives the value that was read anew from the primary data as they were at the moment of
the answer, other views included. A read that waits is checked there and then; a `peek`, which
cannot wait for a derivation that does, when the block is left.

A derivation must give equal values for equal primary data; one that asks a clock cannot be checked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import StaleRead
from .reading import ABSENT, enter_reading, leave_reading

if TYPE_CHECKING:
    from .fabric import Fabric
    from .source import Entry, Source
    from .view import View

Moment = tuple[int, ...]
"""The version of each source of a fabric."""


class Held(NamedTuple):
    """What a key held from a version on; `came` orders keys by when they were last added."""

    version: int
    value: Any
    came: int


class History:
    """What each key of one source held, version by version, since the checker began."""

    def __init__(self, source: Source[Any, Any]) -> None:
        self._n_noted = 0
        self._held: dict[Hashable, list[Held]] = {}
        for key in source.keys_now():
            self._append(key, source.version, source.get(key))

    def note(self, source: Source[Any, Any], entry: Entry) -> None:
        self._append(entry.key, source.version, entry.value)

    def value(self, key: Hashable, version: int) -> Any:
        held = self._at(key, version)
        return ABSENT if held is None else held.value

    def keys(self, version: int) -> list[Any]:
        """Return the keys there were, in the order in which they came."""
        present: list[tuple[int, Hashable]] = []
        for key in self._held:
            held = self._at(key, version)
            if held is not None and held.value is not ABSENT:
                present.append((held.came, key))
        return [key for _, key in sorted(present, key=lambda item: item[0])]

    def _append(self, key: Hashable, version: int, value: Any) -> None:
        rows = self._held.setdefault(key, [])
        self._n_noted += 1
        stayed = rows and rows[-1].value is not ABSENT
        rows.append(Held(version, value, rows[-1].came if stayed else self._n_noted))

    def _at(self, key: Hashable, version: int) -> Held | None:
        rows = self._held.get(key, [])
        at = bisect_right(rows, version, key=lambda held: held.version)
        return rows[at - 1] if at else None


class Replay:
    """A `Reading` of the past: all sources as they were at one moment."""

    open = True

    def __init__(self, histories: dict[int, History], moment: Moment) -> None:
        self._histories = histories
        self._moment = moment

    def read_value(self, source: Source[Any, Any], key: Hashable) -> Any:
        return self._histories[source.index].value(key, self._moment[source.index])

    def read_keys(self, source: Source[Any, Any]) -> list[Any]:
        return self._histories[source.index].keys(self._moment[source.index])


class Checker:
    """Compare the answers of a fabric's views with its primary data.

    Attributes:
        n_checked: How many answers were compared.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.n_checked = 0
        self._sources = fabric.sources
        self._histories = {source.index: History(source) for source in fabric.sources}
        self._peeked: list[tuple[View[Any, Any], Any, Any, Moment]] = []

    def start(self) -> None:
        for source in self._sources:
            source.watchers.append(self._note)

    def stop(self) -> None:
        for source in self._sources:
            source.watchers.remove(self._note)

    async def verify(self, view: View[Any, Any], key: Hashable, found: Any) -> None:
        """Check an answer given now.

        Raises:
            StaleRead: It is another value than the primary data gives.
        """
        await self._compare(view, key, found, self._now())

    def witness(self, view: View[Any, Any], key: Hashable, found: Any) -> None:
        """Note an answer given now, to be checked by `verify_peeked`."""
        self._peeked.append((view, key, found, self._now()))

    async def verify_peeked(self) -> None:
        peeked, self._peeked = self._peeked, []
        for view, key, found, moment in peeked:
            await self._compare(view, key, found, moment)

    async def _compare(
        self, view: View[Any, Any], key: Hashable, found: Any, moment: Moment
    ) -> None:
        token = enter_reading(Replay(self._histories, moment))
        try:
            expected = await view.derive(key)
        finally:
            leave_reading(token)
        self.n_checked += 1
        if found != expected:
            raise StaleRead(view.name, key, found, expected)

    def _now(self) -> Moment:
        return tuple(source.version for source in self._sources)

    def _note(self, source: Source[Any, Any], entry: Entry) -> None:
        self._histories[source.index].note(source, entry)


@asynccontextmanager
async def checked(fabric: Fabric) -> AsyncIterator[Checker]:
    """Check every read of a running fabric's views, in tests: memory grows with each write.

    Raises:
        StaleRead: From the read itself; for a `peek` from leaving the block.
        RuntimeError: The fabric is checked already.
    """
    if fabric.checker is not None:
        raise RuntimeError(f"fabric {fabric.name!r} is checked already")
    for source in fabric.sources:
        source.running()
    checker = fabric.checker = Checker(fabric)
    checker.start()
    try:
        yield checker
    finally:
        fabric.checker = None
        checker.stop()
    await checker.verify_peeked()
