"""Random histories against a plain model: no read is ever stale, whatever comes between what.

The model is a dict, and the derivation as a function of it. Derivations stop at a gate between
their reads, so that writes, cancellations and other readers come in the middle of them; which gate
opens next is part of the history and shrinks with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.actors.coherent import ABSENT, Change, Fabric, Source, View, checked
from penumbra.actors.coherent.reading import AbsentType
from penumbra.actors.runtime import Conductor, LowestKey

KEYS = ("a", "b", "c")
Step: TypeAlias = tuple[Any, ...]

keys = st.sampled_from(KEYS)
workers = st.integers(0, 2)
views = st.sampled_from(["pair", "total", "nested"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), keys, st.integers(0, 5), workers),
        st.tuples(st.just("delete"), keys, workers),
        st.tuples(st.just("touch"), keys, workers),
        st.tuples(st.just("update"), st.dictionaries(keys, st.integers(0, 5), max_size=3)),
        st.tuples(st.just("read"), views, keys, workers),
        st.tuples(st.just("peek"), views, keys, workers),
        st.tuples(st.just("open"), st.integers(0, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("event"), workers),
        st.tuples(st.just("turn")),
        st.tuples(st.just("settled"), st.integers(0, 3)),
    ),
    max_size=30,
)


def expected(model: dict[str, int], view: str, key: str) -> Any:
    """Derive from the model what a view gives."""
    pair = (key, model.get(key, 0), model.get("a", 0))
    return {"pair": pair, "total": sum(model.values()), "nested": (pair, len(model))}[view]


@dataclass
class Rig:
    """A source with three views whose derivations stop at gates, and the model beside it."""

    source: Source[str, int] = field(default_factory=lambda: Source("rows", {"a": 1}))
    model: dict[str, int] = field(default_factory=lambda: {"a": 1})
    gates: list[anyio.Event] = field(default_factory=list)
    readers: list[anyio.CancelScope] = field(default_factory=list)
    answers: int = 0
    gated: bool = True

    def views(self) -> dict[str, View[str, Any]]:
        rows = self.source

        @rows.view(limit=2)
        async def pair(key: str) -> tuple[str, int, int]:
            first = rows.get(key, 0)
            await self.gate()
            return key, first, rows.get("a", 0)

        def add(total: int, change: Change) -> int | AbsentType:
            if ABSENT in (change.old, change.new):
                return ABSENT
            difference: int = change.new - change.old
            return total + difference

        @rows.view(apply=add)
        async def total(_: str) -> int:
            result = 0
            for key in rows:
                result += rows.get(key, 0)
                await self.gate()
            return result

        @rows.view()
        async def nested(key: str) -> tuple[tuple[str, int, int], int]:
            n = len(rows)
            await self.gate()
            return await pair(key), n

        return {"pair": pair, "total": total, "nested": nested}

    async def gate(self) -> None:
        if self.gated:
            gate = anyio.Event()
            self.gates.append(gate)
            await gate.wait()

    def write(self, step: Step) -> None:
        match step:
            case ("set", key, value, by):
                self.model[key] = value
                self.source.set(key, value, by=by)
            case ("delete", key, by):
                self.model.pop(key, None)
                self.source.delete(key, by=by)
            case ("touch", key, by):
                self.source.touch(key, by=by)
            case ("update", values):
                self.model.update(values)
                self.source.update(values)

    async def read(self, fabric: Fabric, view: View[str, Any], key: str, worker: int) -> None:
        with anyio.CancelScope() as scope:
            self.readers.append(scope)
            answer = await view.at(fabric.workers[worker])(key)
            # No turn of the loop lies between the answer and this line: it is true now.
            assert answer == expected(self.model, view.name, key)
            self.answers += 1


async def play(history: list[Step], capacity: int, lazy: bool, seed: int | None) -> None:
    rig = Rig()
    views = rig.views()
    conductor = None if seed is None else Conductor(LowestKey(seed))
    fabric = Fabric(rig.source, workers=3, capacity=capacity, lazy=lazy, conductor=conductor)
    n_readers = 0
    async with fabric, anyio.create_task_group() as tasks:
        for step in history:
            match step:
                case ("read", view, key, worker):
                    tasks.start_soon(rig.read, fabric, views[view], key, worker)
                    n_readers += 1
                case ("peek", view, key, worker):
                    found = views[view].at(fabric.workers[worker]).peek(key, ABSENT)
                    assert found is ABSENT or found == expected(rig.model, view, key)
                case ("open", at) if rig.gates:
                    rig.gates.pop(at % len(rig.gates)).set()
                case ("cancel", at) if rig.readers:
                    rig.readers[at % len(rig.readers)].cancel()
                case ("event", worker):
                    fabric.workers[worker].apply_nowait()
                    assert fabric.workers[worker].applied(rig.source) == rig.source.version
                case ("turn",):
                    await anyio.wait_all_tasks_blocked()
                    assert lazy or all(not worker.behind for worker in fabric.workers)
                case ("settled", back) if not lazy:
                    version = max(0, rig.source.version - back)
                    await rig.source.settled(version, within=5)
                    assert all(w.applied(rig.source) >= version for w in fabric.workers)
                case _:
                    rig.write(step)
            assert dict(zip(rig.source, map(rig.source.get, rig.source), strict=True)) == rig.model
            fabric.check()
        rig.gated = False
        for gate in rig.gates:
            gate.set()
    n_cancelled = sum(scope.cancelled_caught for scope in rig.readers)
    assert rig.answers + n_cancelled == n_readers
    assert all(worker.left and not worker.behind for worker in fabric.workers)
    rig.source.check()


@pytest.mark.shows("P11", "K5", "A40 ¶126")
@pytest.mark.parametrize("loop", ["trio", "asyncio"])
@settings(max_examples=150, deadline=None)
@given(
    history=steps,
    capacity=st.sampled_from([1, 2, 64]),
    lazy=st.booleans(),
    seed=st.none() | st.integers(0, 3),
)
def test_no_read_is_stale_in_any_history(
    loop: str, history: list[Step], capacity: int, lazy: bool, seed: int | None
) -> None:
    anyio.run(play, history, capacity, lazy, seed, backend=loop)


@pytest.mark.shows("P11")
@pytest.mark.parametrize("loop", ["trio", "asyncio"])
@settings(max_examples=60, deadline=None)
@given(writes=st.lists(st.tuples(st.just("set") | st.just("x"), keys, st.integers(0, 5), workers)))
def test_the_checker_agrees_with_the_model(loop: str, writes: list[Step]) -> None:
    async def main() -> None:
        rig = Rig(gated=False)
        views = rig.views()
        async with Fabric(rig.source, workers=3, capacity=1) as fabric:
            async with checked(fabric) as checker:
                for kind, key, value, by in writes:
                    rig.write(("set", key, value, by) if kind == "set" else ("delete", key, by))
                    for name, view in views.items():
                        copy = view.at(fabric.workers[by])
                        assert await copy(key) == expected(rig.model, name, key)
                        assert copy.peek(key) == expected(rig.model, name, key)
            # `nested` reads `pair` in each derivation, which is a read like any other.
            assert checker.n_checked >= 6 * len(writes)

    anyio.run(main, backend=loop)
