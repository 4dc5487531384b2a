"""Views: what is derived from sources, and each worker's copies of it.

The life of a derived value (`Derived`) in one worker's copy:

    filling    somebody's read derives it; readers that come meanwhile wait for that one
    overtaken  what it has read changed before it was done: it will not be kept, nor answered
    kept       answers reads; a patch for what it depends on applies a change to it, or drops it
    gone

From the moment a derivation reads an entry, its worker is told of changes to that entry; and before
a derived value is kept or answered, the worker takes what it was told. So a change that arrives
while a value is derived is never lost: it is the fill of a shadow page (A40 Fig. 8), whose every
read is registered (832) before it is made. The cache that stores what it computed and *then* hears
of changes serves the old value for ever.

A fill belongs to the reader who began it: cancelled, or ended by an error, it leaves nothing, and
one of those who waited for it begins again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar, overload

import anyio
import anyio.lowlevel
import msgspec

from .errors import Circular, NotRunning, Overtaken
from .reading import ABSENT, AbsentType, Change, current_reading, enter_reading, leave_reading

if TYPE_CHECKING:
    from .fabric import Worker
    from .source import Entry, Source

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
D = TypeVar("D")

DEFAULT_ATTEMPTS: Final = 64
_TURN: Final = 64
"""How many reads may be answered from a copy between two checkpoints."""

Dependency = tuple[int, int]
"""(number of the source in its fabric, number of the entry in its source)"""


class Used(NamedTuple):
    """An entry as a derived value used it."""

    version: int
    value: Any


class CopyStatistics(msgspec.Struct, frozen=True):
    """What one worker's copy of a view has seen.

    Attributes:
        n_hits: Reads answered from the copy.
        n_derived: Derivations begun; `n_overtaken` of them were thrown away for a change.
        n_applied: Changes applied to kept values.
        n_dropped: Kept values dropped for a change, by a flush, or for want of room.
        n_failed: Apply functions that raised; the value was dropped.
        n_kept: Values kept now.
    """

    n_hits: int
    n_derived: int
    n_overtaken: int
    n_applied: int
    n_dropped: int
    n_failed: int
    n_kept: int


class Derived(Generic[V]):
    """One value in one copy, from the begin of its derivation until it is dropped."""

    __slots__ = ("copy", "done", "key", "open", "overtaken", "parent", "used", "value", "waits_for")

    def __init__(self, copy: Copy[Any, V], key: Hashable, parent: Derived[Any] | None) -> None:
        self.copy = copy
        self.key = key
        self.parent = parent
        self.value: Any = ABSENT
        self.used: dict[Dependency, Used] = {}
        self.open = True
        self.overtaken = False
        self.done = anyio.Event()
        self.waits_for: set[Derived[Any]] = set()

    # As a `Reading`: it is derived, and says so to whom it reads.

    def read_value(self, source: Source[Any, Any], key: Hashable) -> Any:
        self.copy.worker.refuse_foreign(source)
        entry = source.entry_for_reader(key)
        self.uses((source.index, entry.number), Used(entry.version, entry.value))
        return entry.value

    def read_keys(self, source: Source[Any, Any]) -> list[Any]:
        self.copy.worker.refuse_foreign(source)
        members = source.members
        self.uses((source.index, members.number), Used(members.version, ABSENT))
        return source.keys_now()

    def uses(self, dependency: Dependency, used: Used) -> None:
        """Note that it depends on an entry; from now on its worker is told of changes (832)."""
        if dependency not in self.used:
            self.used[dependency] = used
            self.copy.worker.link(dependency, self)

    def needs(self, other: Derived[Any]) -> bool:
        """Say whether it waits for another one, directly or through others."""
        seen: set[int] = set()
        rest: list[Derived[Any]] = [self]
        while rest:
            derived = rest.pop()
            if derived is other:
                return True
            if id(derived) not in seen:
                seen.add(id(derived))
                rest.extend(derived.waits_for)
        return False


class Copy(Generic[K, V]):
    """One worker's values of a view.

    Invariant: a kept value depends on nothing that changed since, except by patches that wait in
    the worker's channels.
    """

    def __init__(self, view: View[K, V], worker: Worker) -> None:
        self.view = view
        self.worker = worker
        self._kept: dict[Hashable, Derived[V]] = {}
        self._fills: dict[Hashable, Derived[V]] = {}
        self._unyielded = 0
        self._hits = self._derived = self._overtaken = 0
        self._applied = self._dropped = self._failed = 0
        self.failure: Exception | None = None

    # Reading.

    @overload
    def peek(self, key: K) -> V | None: ...
    @overload
    def peek(self, key: K, default: D) -> V | D: ...
    def peek(self, key: K, default: Any = None) -> Any:
        """Return the value if it is kept and still true, else the default. Never waits.

        Raises:
            NotRunning: The fabric is left, or was never entered.
            RuntimeError: A derivation peeks.
        """
        if current_reading() is not None:
            raise RuntimeError("a derivation awaits views: what it peeks at would not be recorded")
        derived = self._look_up(key)
        if derived is None:
            return default
        if self.worker.fabric.checker is not None:
            self.worker.fabric.checker.witness(self.view, key, derived.value)
        return derived.value

    async def __call__(self, key: K) -> V:
        """Return the value as it is true now, deriving it if it is not kept.

        A checkpoint if it has to be derived, and once in 64 reads. Cancelled, nothing is kept.

        Raises:
            NotRunning: The fabric is left, or was never entered.
            Overtaken: Changes overtook each of `attempts` derivations.
            Circular: The value is derived from itself.
        """
        reading = current_reading()
        if reading is not None and not isinstance(reading, Derived):
            return await self.view.derive(key)  # a checker derives all of it anew
        self._unyielded += 1
        if self._unyielded > _TURN:
            self._unyielded = 0
            await anyio.lowlevel.checkpoint()
        derived = self._look_up(key)
        if derived is None:
            derived = await self._derive(key, reading)
        value: V = derived.value
        if self.worker.fabric.checker is not None:
            await self.worker.fabric.checker.verify(self.view, key, value)
        return value

    async def at_least(self, version: int, *, within: float | None = None) -> None:
        """Wait until this copy has applied a version of its source, which may be yet to come.

        Raises:
            NotSettled: Not within that many seconds.
            NotRunning: The fabric is left, or was never entered.
        """
        await self.view.source.at_least(version, within=within)
        self.worker.apply_nowait()

    async def _derive(self, key: K, parent: Derived[Any] | None) -> Derived[V]:
        for _ in range(self.view.attempts):
            other = self._fills.get(key)
            if other is not None:
                await self._join(other, parent)
            else:
                derived = await self._fill(key, parent)
                if not derived.overtaken:
                    return derived
                await anyio.lowlevel.checkpoint()
            kept = self._look_up(key)
            if kept is not None:
                return kept
        raise Overtaken(self.view.name, key, self.view.attempts)

    async def _join(self, other: Derived[V], parent: Derived[Any] | None) -> None:
        if parent is None:
            await other.done.wait()
            return
        if other.needs(parent):
            raise Circular(self.view.name, other.key)
        parent.waits_for.add(other)
        try:
            await other.done.wait()
        finally:
            parent.waits_for.discard(other)

    async def _fill(self, key: K, parent: Derived[Any] | None) -> Derived[V]:
        """Derive a value; keep it unless it was overtaken."""
        derived: Derived[V] = Derived(self, key, parent)
        self._fills[key] = derived
        self._derived += 1
        if parent is not None:
            parent.waits_for.add(derived)
        token = enter_reading(derived)
        try:
            try:
                derived.value = await self.view.derive(key)
            except Exception:
                self.worker.apply_nowait()
                if not derived.overtaken:  # else it may have failed for reading half a change
                    raise
            self.worker.apply_nowait()  # what we were told while we derived
            self.worker.refuse_if_left()
            if derived.overtaken:
                self._overtaken += 1
            else:
                self._keep(derived)
        finally:
            leave_reading(token)
            derived.open = False
            derived.parent = None
            if parent is not None:
                parent.waits_for.discard(derived)
            if self._kept.get(key) is not derived:
                self.worker.unlink(derived)
            if self._fills.get(key) is derived:
                del self._fills[key]
            derived.done.set()
        return derived

    def _look_up(self, key: Hashable) -> Derived[V] | None:
        worker = self.worker
        if worker.behind:
            worker.apply_nowait()
        if worker.left:
            worker.refuse_if_left()
        derived = self._kept.get(key)
        if derived is None:
            return None
        self._hits += 1
        if self.view.limit is not None:
            self._kept[key] = self._kept.pop(key)
        reading = current_reading()
        if isinstance(reading, Derived):
            self._uses_all_of(reading, derived)
        return derived

    def _keep(self, derived: Derived[V]) -> None:
        parent = derived.parent
        if parent is not None and parent.open:
            self._uses_all_of(parent, derived)
        self._kept[derived.key] = derived
        if self.view.limit is not None and len(self._kept) > self.view.limit:
            self._drop(next(iter(self._kept.values())))

    def _uses_all_of(self, outer: Derived[Any], inner: Derived[V]) -> None:
        if outer.copy.worker.fabric is not self.worker.fabric:
            raise RuntimeError(f"{outer.copy.view.name} reads {self.view.name} of another fabric")
        for dependency, used in inner.used.items():
            outer.uses(dependency, used)

    # For the worker.

    def change(
        self, derived: Derived[V], dependency: Dependency, source: Source[Any, Any], entry: Entry
    ) -> None:
        """Take one change (872-876): apply it to a kept value, or drop it; overtake a fill."""
        if derived.open:
            derived.overtaken = True
            return
        used = derived.used[dependency]
        value: V | AbsentType = ABSENT
        if self.view.apply is not None and entry is not source.members:
            change = Change(source.name, entry.key, used.value, entry.value)
            try:
                value = self.view.apply(derived.value, change)
            except Exception as error:
                self._failed += 1
                self.failure = error
        if value is ABSENT:
            self._drop(derived)
        else:
            self._applied += 1
            derived.value = value
            derived.used[dependency] = Used(entry.version, entry.value)

    def flush(self) -> None:
        """Drop every value and overtake every fill."""
        for derived in self._fills.values():
            derived.overtaken = True
        for derived in tuple(self._kept.values()):
            self._drop(derived)

    def _drop(self, derived: Derived[V]) -> None:
        del self._kept[derived.key]
        self._dropped += 1
        self.worker.unlink(derived)

    def statistics(self) -> CopyStatistics:
        return CopyStatistics(
            self._hits,
            self._derived,
            self._overtaken,
            self._applied,
            self._dropped,
            self._failed,
            len(self._kept),
        )

    def check(self) -> None:
        limit = self.view.limit
        assert limit is None or len(self._kept) <= limit
        for key, derived in self._kept.items():
            assert derived.key == key
            assert not derived.open
            assert not derived.overtaken
            self.worker.check_linked(derived)
        for derived in self._fills.values():
            assert derived.open
            assert not derived.done.is_set()
            self.worker.check_linked(derived)


class View(Generic[K, V]):
    """A derivation of which each worker keeps what it derived. Made by `Source.view`.

    Reading the view itself reads the copy of the fabric's first worker.
    """

    def __init__(
        self,
        source: Source[Any, Any],
        derive: Callable[[K], Awaitable[V]],
        apply: Callable[[V, Change], V | AbsentType] | None,
        limit: int | None,
        attempts: int,
    ) -> None:
        if (limit is not None and limit < 1) or attempts < 1:
            raise ValueError(f"limit = {limit}, attempts = {attempts}: must be at least 1")
        self.source = source
        self.name = getattr(derive, "__name__", "view")
        self.derive = derive
        self.apply = apply
        self.limit = limit
        self.attempts = attempts
        self.first: Copy[K, V] | None = None

    def __call__(self, key: K) -> Coroutine[Any, Any, V]:
        """As `Copy.__call__`, of the first worker's copy."""
        return self._copy()(key)

    @overload
    def peek(self, key: K) -> V | None: ...
    @overload
    def peek(self, key: K, default: D) -> V | D: ...
    def peek(self, key: K, default: Any = None) -> Any:
        """As `Copy.peek`, of the first worker's copy."""
        return self._copy().peek(key, default)

    async def at_least(self, version: int, *, within: float | None = None) -> None:
        """As `Copy.at_least`, of the first worker's copy."""
        await self._copy().at_least(version, within=within)

    def at(self, worker: Worker) -> Copy[K, V]:
        """Return a worker's copy."""
        return worker.copy_of(self)

    def _copy(self) -> Copy[K, V]:
        if self.first is None:
            raise NotRunning(self.source.name)
        return self.first
