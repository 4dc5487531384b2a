"""A source: primary data, every change of which has a version.

    prices = Source("prices", {"apple": 3})
    version = prices.set("apple", 4)          # synchronous; tells the workers that derive from it

A write never waits and never fails for want of room: a worker whose channel is full drops all it
has derived instead (a flush). The steps of a write are those of a producer, P1-P9 in
`core/producer.py`, with the workers that use the entry as the consumers of its trace (832).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar, overload

from .errors import NotRunning
from .reading import ABSENT, AbsentType, Change, current_reading
from .view import DEFAULT_ATTEMPTS, View

if TYPE_CHECKING:
    from .fabric import Fabric

K = TypeVar("K", bound=Hashable)
P = TypeVar("P")
D = TypeVar("D")
VK = TypeVar("VK", bound=Hashable)
V = TypeVar("V")

MEMBERS: Final = 0
"""The number of the entry "which keys there are"."""


class Entry:
    """One key of a source: primary data, the version of its last change, and who derives from it.

    Attributes:
        number: The offset by which patches name it; never used again for another key.
        told: A bit for each worker that derives from it.
    """

    __slots__ = ("key", "number", "told", "value", "version")

    def __init__(self, key: Any, number: int, version: int) -> None:
        self.key = key
        self.number = number
        self.version = version
        self.value: Any = ABSENT
        self.told = 0


class MakeView(Protocol):
    """What `Source.view` gives to be put before a derivation."""

    def __call__(self, derive: Callable[[VK], Awaitable[V]], /) -> View[VK, V]: ...


class MakePatchedView(Protocol[V]):
    """The same, where the derived values must be of the type that `apply` takes."""

    def __call__(self, derive: Callable[[VK], Awaitable[V]], /) -> View[VK, V]: ...


class Source(Generic[K, P]):
    """Hold primary data by key; tell the running fabric, if it belongs to one, of each change.

    Not for use from several threads. Values are handed out as they are: change them by `set` only.

    Invariant: every entry without a value is derived from by some worker; an entry's number is its
    key in `entries`.

    Attributes:
        version: How many writes there were; one `update` is one write.
    """

    def __init__(self, name: str, values: Mapping[K, P] | Iterable[tuple[K, P]] = ()) -> None:
        self.name = name
        self.version = 0
        self.index = -1
        self.fabric: Fabric | None = None
        self.views: list[View[Any, Any]] = []
        self.watchers: list[Callable[[Source[Any, Any], Entry], None]] = []
        self.members = Entry(None, MEMBERS, 0)
        self.entries: dict[int, Entry] = {MEMBERS: self.members}
        self._by_key: dict[Any, Entry] = {}
        self._n_numbers = 1
        for key, value in dict(values).items():
            self._entry(key).value = value

    # Reading. Inside a derivation all of these are recorded as what it depends on.

    @overload
    def get(self, key: K) -> P | None: ...
    @overload
    def get(self, key: K, default: D) -> P | D: ...
    def get(self, key: K, default: Any = None) -> Any:
        """Return the value of a key as it is now, or the default."""
        value = self._read(key)
        return default if value is ABSENT else value

    def __getitem__(self, key: K) -> P:
        value = self._read(key)
        if value is ABSENT:
            raise KeyError(key)
        return value

    def __contains__(self, key: K) -> bool:
        return self._read(key) is not ABSENT

    def keys(self) -> list[K]:
        """Return the keys, in the order in which they came."""
        reading = current_reading()
        return self.keys_now() if reading is None else reading.read_keys(self)

    def __iter__(self) -> Iterator[K]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def _read(self, key: K) -> P | AbsentType:
        reading = current_reading()
        if reading is not None:
            value: P | AbsentType = reading.read_value(self, key)
            return value
        entry = self._by_key.get(key)
        return ABSENT if entry is None else entry.value

    # Writing.

    def set(self, key: K, value: P, *, by: int = 0) -> int:
        """Store a value and tell who derives from it; return the version. Never waits.

        Args:
            by: Number of the worker that writes, for the statistics of its channels.

        Raises:
            RuntimeError: A derivation or an apply function writes; nothing was stored.
            IndexError: There is no such worker; nothing was stored.
        """
        self._refuse(by)
        self.version += 1
        self._store(key, value, by)
        self._written()
        return self.version

    def touch(self, key: K, *, by: int = 0) -> int:
        """Say that what a key stands for has changed elsewhere, as in a database; as `set`."""
        self._refuse(by)
        self.version += 1
        entry = self._by_key.get(key)
        self._store(key, ABSENT if entry is None else entry.value, by)
        self._written()
        return self.version

    def update(self, values: Mapping[K, P], *, by: int = 0) -> int:
        """Store some values as one write: no reader sees part of it."""
        self._refuse(by)
        self.version += 1
        for key, value in values.items():
            self._store(key, value, by)
        self._written()
        return self.version

    def delete(self, key: K, *, by: int = 0) -> int:
        """Remove a key, if it is there; as `set`."""
        self._refuse(by)
        self.version += 1
        self._store(key, ABSENT, by)
        self._written()
        return self.version

    def _store(self, key: K, value: P | AbsentType, by: int) -> None:
        entry = self._by_key.get(key)
        if entry is None:
            if value is ABSENT:
                return
            entry = self._entry(key)
        came_or_went = (entry.value is ABSENT) is not (value is ABSENT)
        changed = [entry, self.members] if came_or_went else [entry]
        told = entry.told | (self.members.told if came_or_went else 0)
        if told and self.fabric is not None:
            self.fabric.begin(self.index, changed, by)
        entry.value = value  # 831
        entry.version = self.version
        if came_or_went:
            self.members.version = self.version
            if value is not ABSENT:  # a key that comes back comes last
                del self._by_key[key]
                self._by_key[key] = entry
        for watch in self.watchers:
            watch(self, entry)
        if told and self.fabric is not None:
            self.fabric.post(self.index, changed, self.version, by)
        self.forget(entry)

    def _refuse(self, by: int) -> None:
        fabric = self.fabric
        if current_reading() is not None or (fabric is not None and fabric.is_applying):
            raise RuntimeError(f"source {self.name!r}: a derivation must not write primary data")
        if fabric is not None and not 0 <= by < len(fabric.workers):
            raise IndexError(f"no worker {by} in a fabric of {len(fabric.workers)}")

    def _written(self) -> None:
        if self.fabric is not None:
            self.fabric.moved()

    # Waiting.

    async def settled(self, version: int, *, within: float | None = None) -> None:
        """Wait until every worker has applied all changes up to a version: a shootdown.

        Raises:
            NotSettled: Not within that many seconds.
            NotRunning: The fabric is left, or was never entered.
            ValueError: There is no such version yet.
        """
        if version > self.version:
            raise ValueError(f"source {self.name!r} is at version {self.version}, not {version}")
        await self.running().wait_applied(self, version, None, within)

    async def at_least(self, version: int, *, within: float | None = None) -> None:
        """Wait until the source has come to a version, which somebody else may yet write.

        Raises:
            NotSettled, NotRunning: As `settled`.
        """
        await self.running().wait_applied(self, version, (), within)

    # Views.

    @overload
    def view(self, *, limit: int | None = ..., attempts: int = ...) -> MakeView: ...
    @overload
    def view(
        self,
        *,
        apply: Callable[[V, Change], V | AbsentType],
        limit: int | None = ...,
        attempts: int = ...,
    ) -> MakePatchedView[V]: ...
    def view(
        self,
        *,
        apply: Callable[[Any, Change], Any] | None = None,
        limit: int | None = None,
        attempts: int = DEFAULT_ATTEMPTS,
    ) -> Any:
        """Make a derivation, `async def f(key)`, a view: each worker keeps what it has derived.

        A derivation reads sources of one fabric, and other views; it must not write them.

        Args:
            apply: `apply(value, change)` returns a derived value brought up to date with one
                change, or ABSENT to have it derived again when it is read. By default it always is.
            limit: How many values each worker keeps; the one not read for longest goes first.
            attempts: How often a read derives anew when changes overtake it.
        """

        def make(derive: Callable[[VK], Awaitable[V]]) -> View[VK, V]:
            if self.fabric is not None:
                raise RuntimeError(f"source {self.name!r} is in a running fabric already")
            view: View[VK, V] = View(self, derive, apply, limit, attempts)
            self.views.append(view)
            return view

        return make

    # For the fabric, its workers and checkers.

    def running(self) -> Fabric:
        if self.fabric is None:
            raise NotRunning(self.name)
        return self.fabric

    def entry_for_reader(self, key: Hashable) -> Entry:
        """Return the entry of a key, made if need be: a reader depends on what is not there, too.

        Whoever does not then set its bit in `told` calls `forget`.
        """
        return self._entry(key)

    def forget(self, entry: Entry) -> None:
        """Drop an entry that has no value and that nobody derives from."""
        if entry.value is ABSENT and not entry.told and entry is not self.members:
            self.entries.pop(entry.number, None)
            self._by_key.pop(entry.key, None)

    def keys_now(self) -> list[Any]:
        return [key for key, entry in self._by_key.items() if entry.value is not ABSENT]

    def check(self) -> None:
        assert len(self.entries) == len(self._by_key) + 1
        for entry in self._by_key.values():
            assert self.entries[entry.number] is entry
            assert entry.value is not ABSENT or entry.told, f"{entry.key!r} is nobody's"
            assert entry.version <= self.version

    def _entry(self, key: Any) -> Entry:
        entry = self._by_key.get(key)
        if entry is None:
            entry = self._by_key[key] = Entry(key, self._n_numbers, self.version)
            self.entries[self._n_numbers] = entry
            self._n_numbers += 1
        return entry
