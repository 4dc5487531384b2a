"""The fabric: sources, workers and the patch channels between them, running.

    async with Fabric(prices, workers=2) as fabric:
        version = prices.set("apple", 4)
        await prices.settled(version, within=0.5)

Each worker has what a virtual CPU has: copies of derived data, one bounded channel from each
worker, and events at which it takes its patches. An event comes before each read of its copies, and
as soon as the loop gives the worker's actor a turn; a lazy worker has the former alone. A source
posts into the channels of those workers only that derive from the entry; a full channel makes the
worker drop all it has derived at its next event.

Leaving the block applies what waits and ends every task; leaving it by an exception, or by
cancellation, ends them at once. Either way the sources are free again, and readers and waiters get
`NotRunning`. An exception that leaves the block does so in a group, as it leaves any task group.
Nothing is global: fabrics, systems and machines live side by side.

Source: A40 Figs 11-12, ¶57, 76, 126, 128.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import anyio.lowlevel
import msgspec

from penumbra.actors.core import DEFAULT_CAPACITY, ChannelStatistics, Matrix
from penumbra.actors.runtime import Actor, ActorRef, ActorSystem, Conductor

from .errors import NotRunning, NotSettled
from .view import Copy, Dependency, Derived, View

if TYPE_CHECKING:
    from .checked import Checker
    from .source import Entry, Source

V = TypeVar("V")


class Bell(msgspec.Struct, frozen=True):
    """Patches wait for you."""


_BELL: Final = Bell()


class Listener(Actor[Bell, None]):
    """Take a worker's patches when its bell rings."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def receive(self, message: Bell) -> None:
        self._worker.apply_nowait()


class Worker:
    """One holder of derived data: its copies of all views, and the consumer of its channels.

    Invariant: `users` names exactly what is kept or being derived, under each entry it used, and an
    entry's bit for this worker is set if and only if `users` has it.

    Attributes:
        behind: Per source, the first version that waits in the channels; empty = all is applied.
        left: The fabric is left: nothing is read any more.
    """

    def __init__(self, fabric: Fabric, number: int) -> None:
        self.fabric = fabric
        self.number = number
        self.behind: dict[int, int] = {}
        self.left = False
        self.n_flushes = 0
        self._bit = 1 << number
        self._consumer = fabric.channels.consumer(number)
        self._copies: dict[View[Any, Any], Copy[Any, Any]] = {}
        self._users: dict[Dependency, dict[Derived[Any], None]] = {}
        self.bell: ActorRef[Bell, None] | None = None

    def copy_of(self, view: View[Any, V]) -> Copy[Any, V]:
        """Return this worker's copy of a view.

        Raises:
            NotRunning: The view's source is not of this fabric, or the fabric is left.
        """
        if view.source.fabric is not self.fabric:
            raise NotRunning(view.source.name)
        copy = self._copies.get(view)
        if copy is None:
            copy = self._copies[view] = Copy(view, self)
        return copy

    def applied(self, source: Source[Any, Any]) -> int:
        """Return the version of a source up to which this worker has applied all changes."""
        first = self.behind.get(source.index)
        return source.version if first is None else first - 1

    def apply_nowait(self) -> None:
        """Take what waits in the channels, and make the copies follow: a coherency event.

        Raises:
            RuntimeError: An apply function reads a view.
        """
        if not self.behind:
            return
        fabric = self.fabric
        if fabric.is_applying:
            raise RuntimeError("an apply function must not read views")
        fabric.is_applying = True
        try:
            drained = self._consumer.event()  # 860-878
            if drained.drop_all:
                self._flush()
            for patch in drained.patches:
                self._apply(patch.base, patch.offset)
            self._consumer.settle()
        except BaseException:
            self._flush()
            raise
        finally:
            fabric.is_applying = False
            self.behind.clear()
        fabric.moved()

    def _apply(self, base: int, offset: int) -> None:
        source = self.fabric.sources[base]
        entry = source.entries.get(offset)
        if entry is None:
            return
        for derived in tuple(self._users.get((base, offset), ())):
            if derived.used[base, offset].version != entry.version:
                derived.copy.change(derived, (base, offset), source, entry)

    def _flush(self) -> None:
        self.n_flushes += 1
        for copy in self._copies.values():
            copy.flush()

    # For sources, copies and the fabric.

    def ring(self, index: int, version: int) -> None:
        """Note that something waits, and wake the actor that takes it."""
        if not self.behind and self.bell is not None and not self.bell.closed:
            self.bell.offer(_BELL)
        self.behind.setdefault(index, version)

    def link(self, dependency: Dependency, derived: Derived[Any]) -> None:
        """From now on be told of changes to what a derived value uses (832)."""
        users = self._users.get(dependency)
        if users is None:
            users = self._users[dependency] = {}
            self._entry(dependency).told |= self._bit
        users[derived] = None

    def unlink(self, derived: Derived[Any]) -> None:
        """Forget what a derived value uses, and what nobody else uses here."""
        for dependency in derived.used:
            users = self._users.get(dependency)
            if users is None:  # the fabric was left meanwhile
                continue
            users.pop(derived, None)
            if not users:
                del self._users[dependency]
                entry = self._entry(dependency)
                entry.told &= ~self._bit
                self.fabric.sources[dependency[0]].forget(entry)

    def refuse_if_left(self) -> None:
        if self.left:
            raise NotRunning(self.fabric.name)

    def refuse_foreign(self, source: Source[Any, Any]) -> None:
        """Refuse to derive from a source of whose changes this worker would not hear."""
        if source.fabric is None:
            raise NotRunning(source.name)
        if source.fabric is not self.fabric:
            raise RuntimeError(f"{source.name!r} is in fabric {source.fabric.name!r}, not in this")

    def leave(self) -> None:
        """Drop everything; let readers who still derive find out."""
        self.left = True
        self.behind.clear()
        for dependency in self._users:
            self._entry(dependency).told &= ~self._bit
        for index, number in self._users:
            source = self.fabric.sources[index]
            if (entry := source.entries.get(number)) is not None:
                source.forget(entry)
        self._users.clear()
        self._copies.clear()

    def check(self) -> None:
        for copy in self._copies.values():
            copy.check()
        for dependency, users in self._users.items():
            assert users
            assert self._entry(dependency).told & self._bit
            assert all(dependency in derived.used for derived in users)
        for index, source in enumerate(self.fabric.sources):
            for entry in source.entries.values():
                assert not entry.told & self._bit or (index, entry.number) in self._users
        assert self.behind or self._consumer.is_empty

    def check_linked(self, derived: Derived[Any]) -> None:
        for index, number in derived.used:
            assert derived in self._users[index, number]
            current = self._entry((index, number)).version
            stale = derived.used[index, number].version != current
            assert not stale or self.behind or derived.overtaken

    def _entry(self, dependency: Dependency) -> Entry:
        return self.fabric.sources[dependency[0]].entries[dependency[1]]


class Fabric:
    """Run sources with some workers. Enter it once, with `async with`, in the event loop.

    Not for use from several threads.

    Args:
        sources: Primary data; a source is in one running fabric at a time.
        workers: How many separate sets of copies there are; each costs a channel to each other.
        capacity: Of each channel; a worker told of more than that between two events is flushed.
        lazy: Workers take patches when they are read and at `Worker.apply_nowait`, else never.
        conductor: Chooses which worker runs next; None: the event loop.
    """

    def __init__(
        self,
        *sources: Source[Any, Any],
        workers: int = 1,
        capacity: int = DEFAULT_CAPACITY,
        lazy: bool = False,
        conductor: Conductor | None = None,
        name: str = "fabric",
    ) -> None:
        if len({id(source) for source in sources}) < len(sources):
            raise ValueError("a source is named twice")
        self.name = name
        self.sources = sources
        self.channels = Matrix(workers, capacity)
        self.workers = tuple(Worker(self, number) for number in range(workers))
        self.checker: Checker | None = None
        self.is_applying = False
        self._lazy = lazy
        self._system = ActorSystem(name, conductor=conductor)
        self._entered = False
        self._moved: anyio.Event | None = None

    async def __aenter__(self) -> Fabric:
        if self._entered:
            raise RuntimeError(f"fabric {self.name!r} has been entered before")
        for source in self.sources:
            if source.fabric is not None:
                raise RuntimeError(f"source {source.name!r} is in a running fabric already")
        self._entered = True
        for index, source in enumerate(self.sources):
            source.fabric, source.index = self, index
            for view in source.views:
                view.first = self.workers[0].copy_of(view)
        try:
            await self._system.__aenter__()
        except BaseException:
            self._leave()
            raise
        if not self._lazy:
            for worker in self.workers:
                worker.bell = self._system.spawn(Listener(worker), f"worker-{worker.number}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._system.__aexit__(kind, error, traceback)
        finally:
            self._leave()

    def _leave(self) -> None:
        for worker in self.workers:
            worker.leave()
        for source in self.sources:
            source.fabric = None
            for view in source.views:
                view.first = None
        self.moved()

    # The producer's side; for sources.

    def begin(self, index: int, changed: list[Entry], by: int) -> None:
        """Announce a store (P1)."""
        producer = self.channels.producer(by)
        producer.begin([(index, entry.number) for entry in changed])

    def post(self, index: int, changed: list[Entry], version: int, by: int) -> None:
        """Tell all who derive from the entries (832-848); who cannot be told is to drop all."""
        producer = self.channels.producer(by)
        producer.stored()
        told = 0
        for entry in changed:
            told |= entry.told
            full = producer.post_all(entry.told, index, entry.number)
            for worker in self._workers(full):
                producer.lose(worker.number)
        producer.end()
        for worker in self._workers(told):
            worker.ring(index, version)

    def _workers(self, bits: int) -> list[Worker]:
        return [worker for worker in self.workers if bits >> worker.number & 1] if bits else []

    def moved(self) -> None:
        """Let those who wait for a version look again."""
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    async def wait_applied(
        self,
        source: Source[Any, Any],
        version: int,
        workers: tuple[Worker, ...] | None,
        within: float | None,
    ) -> None:
        """Wait until a source has a version and these workers have applied it; None: all workers.

        Raises:
            NotSettled: Not within that many seconds.
            NotRunning: The fabric is left.
        """
        workers = self.workers if workers is None else workers
        await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(within):
            while True:
                self.workers[0].refuse_if_left()
                if source.version >= version and all(w.applied(source) >= version for w in workers):
                    return
                if self._moved is None:
                    self._moved = anyio.Event()
                await self._moved.wait()
        behind = tuple(w.number for w in workers if w.applied(source) < version <= source.version)
        assert within is not None
        raise NotSettled(source.name, version, within, behind)

    # Looking at it.

    def matrix(self) -> list[list[ChannelStatistics]]:
        """Return what each channel has seen: a row for each writing worker."""
        n = range(len(self.workers))
        return [[self.channels.statistics(writer, reader) for reader in n] for writer in n]

    def check(self) -> None:
        """Assert every invariant of the fabric, its sources and channels."""
        self.channels.check()
        for source in self.sources:
            source.check()
        for worker in self.workers:
            worker.check()
