"""The race on which caches fail: an invalidation that arrives while the value is computed.

A reader misses and begins to compute; a writer changes the row and invalidates; the reader stores
what it computed from the old row, and everybody is served that, for ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from penumbra.actors.coherent import Fabric, Overtaken, Source, checked

pytestmark = [pytest.mark.anyio, pytest.mark.shows("P11", "K5")]


class Gate:
    """Hold the first derivation between its reading of the row and its end."""

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self.opened = anyio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        await self.opened.wait()


async def race(
    read: Callable[[], Awaitable[object]], write: Callable[[], object], gate: Gate
) -> tuple[object, object]:
    """Return what the reader who computed while the write came got, and who read after that."""
    answers: list[object] = []

    async def reader() -> None:
        answers.append(await read())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader)
        await gate.reached.wait()
        write()
        gate.opened.set()
    return answers[0], await read()


async def test_a_cache_that_computes_then_stores_serves_the_old_value_for_ever() -> None:
    rows, cache, gate = {"row": 1}, dict[str, int](), Gate()

    async def read() -> int:
        if "row" not in cache:
            value = rows["row"]
            await gate.pass_through()
            cache["row"] = value
        return cache["row"]

    def write() -> None:
        rows["row"] = 2
        cache.pop("row", None)

    assert await race(read, write, gate) == (1, 1)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("capacity", [1, 64])
async def test_a_view_serves_the_new_value_even_to_whoever_was_computing(
    lazy: bool, capacity: int
) -> None:
    rows, gate = Source("rows", {"row": 1}), Gate()

    @rows.view()
    async def value(key: str) -> int:
        row = rows[key]
        await gate.pass_through()
        return row

    async with Fabric(rows, lazy=lazy, capacity=capacity) as fabric, checked(fabric) as checker:
        found = await race(lambda: value("row"), lambda: rows.set("row", 2), gate)
        assert found == (2, 2)
        assert value.peek("row") == 2
        statistics = value.at(fabric.workers[0]).statistics()
        fabric.check()
    assert (statistics.n_derived, statistics.n_overtaken, statistics.n_kept) == (2, 1, 1)
    assert checker.n_checked == 3


@pytest.mark.parametrize("change", ["set", "update", "delete", "touch"])
async def test_every_kind_of_write_overtakes(change: str) -> None:
    rows, gate = Source("rows", {"row": 1}), Gate()
    database = {"row": 1}

    @rows.view()
    async def value(key: str) -> tuple[int | None, int]:
        found = rows.get(key), database[key]
        await gate.pass_through()
        return found

    def write() -> None:
        database["row"] = 2
        match change:
            case "set":
                rows.set("row", 2)
            case "update":
                rows.update({"other": 1, "row": 2})
            case "delete":
                rows.delete("row")
            case "touch":
                rows.touch("row")

    expected = {"set": 2, "update": 2, "delete": None, "touch": 1}[change]
    async with Fabric(rows):
        assert await race(lambda: value("row"), write, gate) == ((expected, 2), (expected, 2))


async def test_a_key_that_did_not_exist_is_a_dependency_too() -> None:
    rows, gate = Source[str, int]("rows"), Gate()

    @rows.view()
    async def value(key: str) -> int:
        found = rows.get(key, 0)
        await gate.pass_through()
        return found

    async with Fabric(rows) as fabric:
        assert await race(lambda: value("row"), lambda: rows.set("row", 7), gate) == (7, 7)
        fabric.check()


async def test_a_change_below_an_inner_view_overtakes_the_outer_one() -> None:
    rows, gate = Source("rows", {"row": 1}), Gate()

    @rows.view()
    async def inner(key: str) -> int:
        return rows[key] * 10

    @rows.view()
    async def outer(key: str) -> int:
        found = await inner(key)
        await gate.pass_through()
        return found + 1

    async with Fabric(rows) as fabric:
        await inner("row")
        assert await race(lambda: outer("row"), lambda: rows.set("row", 2), gate) == (21, 21)
        fabric.check()


async def test_an_error_from_half_a_change_is_not_the_readers() -> None:
    rows, gate = Source("rows", {"low": 1, "high": 2}), Gate()

    @rows.view()
    async def width(_: int) -> int:
        low = rows["low"]
        await gate.pass_through()
        if rows["high"] <= low:
            raise ValueError("a range that never was")
        return rows["high"] - low

    async with Fabric(rows):
        found = await race(lambda: width(0), lambda: rows.update({"low": -2, "high": 0}), gate)
    assert found == (2, 2)


async def test_a_derivation_that_is_always_overtaken_ends_by_name() -> None:
    rows = Source("rows", {"row": 0})
    reads, written = 0, anyio.Event()

    @rows.view(attempts=5)
    async def value(key: str) -> int:
        nonlocal reads, written
        found = rows[key]
        reads += 1
        written = anyio.Event()
        await written.wait()
        return found

    async def overtake() -> None:
        while True:
            await anyio.wait_all_tasks_blocked()
            rows.set("row", rows["row"] + 1)
            written.set()

    async with Fabric(rows) as fabric, anyio.create_task_group() as tasks:
        tasks.start_soon(overtake)
        with pytest.raises(Overtaken, match="overtaken by changes 5 times"):
            await value("row")
        tasks.cancel_scope.cancel()
        assert reads == 5
        assert value.peek("row") is None
        fabric.check()
