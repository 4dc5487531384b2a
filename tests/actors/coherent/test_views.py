"""What the embedding API promises, one by one."""

from __future__ import annotations

import subprocess
import sys

import anyio
import pytest

from penumbra.actors.coherent import (
    ABSENT,
    Change,
    Circular,
    CopyStatistics,
    Fabric,
    NotRunning,
    NotSettled,
    Source,
    StaleRead,
    View,
    checked,
)
from penumbra.actors.coherent.reading import AbsentType

pytestmark = [pytest.mark.anyio, pytest.mark.shows("P11", "K5")]


def doubled(rows: Source[str, int]) -> View[str, int]:
    @rows.view()
    async def double(key: str) -> int:
        return 2 * rows[key]

    return double


async def test_a_read_is_derived_once_and_then_kept_and_peeked_at() -> None:
    rows = Source("rows", {"a": 1})
    double = doubled(rows)
    async with Fabric(rows) as fabric:
        assert double.peek("a") is None
        assert [await double("a"), await double("a"), double.peek("a")] == [2, 2, 2]
        statistics = double.at(fabric.workers[0]).statistics()
        assert statistics == CopyStatistics(2, 1, 0, 0, 0, 0, 1)


async def test_readers_of_the_same_value_wait_for_one_derivation() -> None:
    rows, opened, answers = Source("rows", {"a": 1}), anyio.Event(), list[int]()
    n_derived = 0

    @rows.view()
    async def value(key: str) -> int:
        nonlocal n_derived
        n_derived += 1
        await opened.wait()
        return rows[key]

    async def reader() -> None:
        answers.append(await value("a"))

    async with Fabric(rows), anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(reader)
        await anyio.wait_all_tasks_blocked()
        opened.set()
    assert (answers, n_derived) == ([1, 1, 1], 1)


async def test_a_reader_cancelled_while_it_derives_leaves_nothing_and_another_begins_again() -> (
    None
):
    rows, opened, answers = Source("rows", {"a": 1}), anyio.Event(), list[int]()

    @rows.view()
    async def value(key: str) -> int:
        found = rows[key]
        await opened.wait()
        return found

    async def reader(scope: anyio.CancelScope) -> None:
        with scope:
            answers.append(await value("a"))

    first, second = anyio.CancelScope(), anyio.CancelScope()
    async with Fabric(rows) as fabric:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reader, first)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(reader, second)
            await anyio.wait_all_tasks_blocked()
            first.cancel()
            await anyio.wait_all_tasks_blocked()
            fabric.check()
            opened.set()
        assert (answers, first.cancelled_caught) == ([1], True)
        assert value.at(fabric.workers[0]).statistics().n_derived == 2


async def test_an_error_is_the_readers_who_derived_and_nothing_is_kept() -> None:
    rows = Source("rows", {"a": 1})
    double = doubled(rows)
    async with Fabric(rows) as fabric:
        with pytest.raises(KeyError):
            await double("b")
        rows.set("b", 3)
        assert await double("b") == 6
        fabric.check()


async def test_changes_between_two_events_are_applied_as_one_to_the_value_itself() -> None:
    rows, changes = Source("rows", {"a": 1, "b": 1}), list[Change]()
    n_derived = 0

    def add(total: int, change: Change) -> int | AbsentType:
        changes.append(change)
        return total + int(change.new) - int(change.old)

    @rows.view(apply=add)
    async def total(_: None) -> int:
        nonlocal n_derived
        n_derived += 1
        return sum(rows[key] for key in rows)

    async with Fabric(rows) as fabric:
        assert await total(None) == 2
        for value in (5, 6, 7):
            rows.set("a", value)
        rows.set("b", 2)
        assert total.peek(None) == 9
        assert changes == [Change("rows", "a", 1, 7), Change("rows", "b", 1, 2)]
        assert fabric.matrix()[0][0].n_coalesced == 2
        rows.set("c", 1)  # which keys there are has changed: no single entry's change says it all
        assert (total.peek(None), await total(None), n_derived) == (None, 10, 2)


async def test_an_apply_function_that_fails_costs_its_value_only() -> None:
    rows = Source("rows", {"a": 1, "b": 1})

    def refuse(_: int, change: Change) -> int:
        raise ValueError(change.key)

    @rows.view(apply=refuse)
    async def value(key: str) -> int:
        return rows[key]

    async with Fabric(rows) as fabric:
        await value("a")
        await value("b")
        rows.set("a", 2)
        assert (value.peek("b"), await value("a")) == (1, 2)
        copy = value.at(fabric.workers[0])
        assert (copy.statistics().n_failed, str(copy.failure)) == (1, "a")


async def test_a_channel_that_is_full_becomes_a_flush_of_that_worker_alone() -> None:
    rows = Source("rows", dict.fromkeys("abcd", 1))
    double = doubled(rows)
    async with Fabric(rows, workers=2, capacity=1) as fabric:
        full, other = (double.at(worker) for worker in fabric.workers)
        for key in "abc":
            await full(key)
        await other("d")
        rows.set("a", 2)
        rows.set("b", 2)
        rows.set("c", 2)
        assert [full.peek(key) for key in "abc"] == [None, None, None]
        assert other.peek("d") == 2
        assert [worker.n_flushes for worker in fabric.workers] == [1, 0]
        assert (fabric.matrix()[0][0].n_overflows, fabric.matrix()[0][1].n_overflows) == (2, 0)
        assert [await full(key) for key in "abc"] == [4, 4, 4]
        fabric.check()


async def test_a_flush_overtakes_what_is_being_derived() -> None:
    rows, opened = Source("rows", {"a": 1, "b": 1}), anyio.Event()

    @rows.view()
    async def pair(_: None) -> tuple[int, int]:
        found = rows["a"], rows["b"]
        await opened.wait()
        return found

    answers: list[tuple[int, int]] = []

    async def reader() -> None:
        answers.append(await pair(None))

    async with Fabric(rows, capacity=1) as fabric, anyio.create_task_group() as tasks:
        tasks.start_soon(reader)
        await anyio.wait_all_tasks_blocked()
        rows.update({"a": 2, "b": 2})
        await rows.settled(1, within=5)
        assert fabric.workers[0].n_flushes == 1
        opened.set()
    assert answers == [(2, 2)]


async def test_a_patch_does_not_overtake_what_has_read_the_new_value_already() -> None:
    rows, opened, answers = Source("rows", {"a": 1}), anyio.Event(), list[int]()
    double = doubled(rows)

    @rows.view()
    async def late(key: str) -> int:
        await opened.wait()
        return rows[key]

    async def reader() -> None:
        answers.append(await late("a"))

    async with Fabric(rows, lazy=True) as fabric:
        await double("a")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reader)
            await anyio.wait_all_tasks_blocked()
            rows.set("a", 2)
            opened.set()
        statistics = late.at(fabric.workers[0]).statistics()
        assert (answers, statistics.n_derived, statistics.n_overtaken) == ([2], 1, 0)
        assert (late.peek("a"), double.peek("a")) == (2, None)


async def test_the_value_not_read_for_longest_goes_first() -> None:
    rows = Source("rows", dict.fromkeys("abc", 1))

    @rows.view(limit=2)
    async def value(key: str) -> int:
        return rows[key]

    async with Fabric(rows) as fabric:
        for key in "abac":
            await value(key)
        assert [value.peek(key) for key in "abc"] == [1, None, 1]
        assert rows.set("b", 2) == 1  # nobody is told of what nobody keeps
        assert fabric.matrix()[0][0].n_posted == 0
        fabric.check()


async def test_settled_waits_for_every_worker_and_says_who_is_behind() -> None:
    rows = Source("rows", {"a": 1})
    double = doubled(rows)
    async with Fabric(rows, workers=3, lazy=True) as fabric:
        for worker in fabric.workers[1:]:
            await double.at(worker)("a")
        version = rows.set("a", 2)
        with pytest.raises(NotSettled) as caught:
            await rows.settled(version, within=0)
        assert caught.value.behind == (1, 2)
        settled = anyio.Event()

        async def wait() -> None:
            await rows.settled(version)
            settled.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            for worker in fabric.workers[1:]:
                await anyio.wait_all_tasks_blocked()
                assert not settled.is_set()
                worker.apply_nowait()
        with pytest.raises(ValueError, match="at version 1, not 2"):
            await rows.settled(2)


async def test_without_anybody_reading_the_workers_hear_of_changes_by_themselves() -> None:
    rows = Source("rows", {"a": 1})
    double = doubled(rows)
    async with Fabric(rows, workers=4) as fabric:
        for worker in fabric.workers:
            await double.at(worker)("a")
        version = rows.set("a", 2)
        assert [worker.applied(rows) for worker in fabric.workers] == [0, 0, 0, 0]
        await rows.settled(version, within=5)
        assert [worker.applied(rows) for worker in fabric.workers] == [1, 1, 1, 1]


async def test_at_least_waits_for_a_version_that_somebody_else_writes() -> None:
    rows = Source("rows", {"a": 1})
    double = doubled(rows)
    answers: list[int] = []

    async def reader() -> None:
        await double.at_least(2)
        answers.append(await double("a"))

    async with Fabric(rows):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reader)
            for value in (5, 7):
                await anyio.wait_all_tasks_blocked()
                assert answers == []
                rows.set("a", value)
        assert answers == [14]
        with pytest.raises(NotSettled, match="no such version yet"):
            await double.at_least(3, within=0)


async def test_leaving_frees_the_sources_and_tells_readers_and_waiters() -> None:
    rows, opened, ends = Source("rows", {"a": 1}), anyio.Event(), list[str]()

    @rows.view()
    async def value(key: str) -> int:
        found = rows[key]
        await opened.wait()
        return found

    async def reader() -> None:
        try:
            await value("a")
        except NotRunning:
            ends.append("reader")

    async def waiter() -> None:
        try:
            await rows.at_least(9)
        except NotRunning:
            ends.append("waiter")

    fabric = Fabric(rows)
    async with anyio.create_task_group() as tasks:
        async with fabric:
            tasks.start_soon(reader)
            tasks.start_soon(waiter)
            await anyio.wait_all_tasks_blocked()
        opened.set()
    assert sorted(ends) == ["reader", "waiter"]
    rows.set("a", 3)
    rows.check()
    for read in (lambda: value.peek("a"), lambda: fabric.workers[0].copy_of(value)):
        with pytest.raises(NotRunning):
            read()
    with pytest.raises(RuntimeError, match="entered before"):
        await fabric.__aenter__()
    async with Fabric(rows):
        assert await value("a") == 3


async def test_a_cancelled_fabric_ends_and_frees_its_sources() -> None:
    rows = Source("rows", {"a": 1})
    double = doubled(rows)
    with anyio.CancelScope() as scope:
        async with Fabric(rows, workers=3):
            await double("a")
            rows.set("a", 2)
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    async with Fabric(rows):
        assert await double("a") == 4


async def test_several_fabrics_live_side_by_side_and_do_not_mix() -> None:
    left, right = Source("left", {"a": 1}), Source("right", {"a": 2})
    doubles = doubled(left), doubled(right)

    @left.view()
    async def across(key: str) -> int:
        return left[key] + right[key]

    async with Fabric(left, name="one"), Fabric(right, name="two"):
        left.set("a", 10)
        assert [await double("a") for double in doubles] == [20, 4]
        with pytest.raises(RuntimeError, match="'right' is in fabric 'two', not in this"):
            await across("a")
        with pytest.raises(RuntimeError, match="in a running fabric already"):
            await Fabric(left).__aenter__()
    async with Fabric(left, right):
        assert await across("a") == 12


async def test_what_is_derived_from_itself_is_refused_by_name() -> None:
    rows = Source("rows", {"a": 1})

    @rows.view()
    async def chicken(key: str) -> int:
        return await egg(key)

    @rows.view()
    async def egg(key: str) -> int:
        await anyio.lowlevel.checkpoint()
        return await chicken(key)

    async def expect(view: View[str, int]) -> None:
        with pytest.raises(Circular, match="derived from itself"):
            await view("a")

    with anyio.fail_after(5):
        async with Fabric(rows) as fabric:
            await expect(chicken)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(expect, chicken)
                tasks.start_soon(expect, egg)
            fabric.check()


async def test_a_derivation_writes_nothing_and_an_apply_function_reads_no_view() -> None:
    rows = Source("rows", {"a": 1})

    @rows.view()
    async def writes(key: str) -> int:
        return rows.set(key, 2)

    @rows.view()
    async def peeks(key: str) -> int | None:
        return writes.peek(key)

    def read(value: int, change: Change) -> int:
        return value + (writes.peek(change.key) or 0)

    @rows.view(apply=read)
    async def plain(key: str) -> int:
        return rows[key]

    async with Fabric(rows) as fabric:
        with pytest.raises(RuntimeError, match="must not write primary data"):
            await writes("a")
        with pytest.raises(RuntimeError, match="awaits views"):
            await peeks("a")
        await plain("a")
        assert rows.set("a", 2) == 1
        assert plain.peek("a") is None
        assert "must not read views" in str(plain.at(fabric.workers[0]).failure)
        with pytest.raises(IndexError, match="no worker 1"):
            rows.set("a", 3, by=1)
        assert (rows["a"], rows.version) == (2, 1)


async def test_tasks_and_helpers_of_a_derivation_are_recorded_too() -> None:
    rows = Source("rows", {"a": 1, "b": 2})

    def helper() -> int:
        return rows["a"]

    @rows.view()
    async def value(_: None) -> int:
        found: list[int] = []

        async def child() -> None:
            found.append(rows["b"])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
        return helper() + found[0]

    async with Fabric(rows):
        assert await value(None) == 3
        rows.set("b", 5)
        assert await value(None) == 6
        rows.set("a", 5)
        assert await value(None) == 10


async def test_the_checker_catches_a_wrong_apply_function() -> None:
    rows = Source("rows", {"a": 1})

    @rows.view(apply=lambda value, _: value)
    async def value(key: str) -> int:
        await anyio.lowlevel.checkpoint()
        return rows[key]

    async with Fabric(rows) as fabric:
        async with checked(fabric) as checker:
            await value("a")
            rows.set("a", 2)
            with pytest.raises(StaleRead, match=r"value\('a'\) gave 1, its primary data gives 2"):
                await value("a")
            assert checker.n_checked == 2
        with pytest.raises(StaleRead):  # noqa: PT012 - raised by leaving the block
            async with checked(fabric):
                value.peek("a")
                rows.set("a", 1)  # what is true later excuses nothing
        assert await value("a") == 1


async def test_the_checker_knows_in_which_order_keys_came() -> None:
    rows = Source("rows", {"a": 1, "b": 2})

    @rows.view()
    async def order(_: None) -> list[str]:
        return list(rows)

    async with Fabric(rows) as fabric, checked(fabric) as checker:
        await order(None)
        rows.delete("a")
        assert await order(None) == ["b"]
        rows.update({"c": 1, "a": 1})
        assert await order(None) == ["b", "c", "a"]
        assert checker.n_checked == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: Fabric(rows, workers=0),
        lambda rows: Fabric(rows, capacity=0),
        lambda rows: Fabric(rows, rows),
        lambda rows: rows.view(limit=0)(doubled(rows).derive),
        lambda rows: rows.view(attempts=0)(doubled(rows).derive),
    ],
)
async def test_what_cannot_be_built_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=r"must be at least 1|named twice"):
        make(Source("rows", {"a": 1}))


async def test_absent_values_are_told_from_none() -> None:
    rows = Source[str, int | None]("rows", {"a": None})
    assert ("a" in rows, rows.get("a", 3), "b" in rows, rows.get("b", 3)) == (True, None, False, 3)
    assert (bool(ABSENT), repr(ABSENT), len(rows)) == (False, "ABSENT", 1)


_WITHOUT_TRIO = """
import asyncio, sys
sys.modules["trio"] = None
from penumbra.actors.coherent import Fabric, Source

async def main():
    rows = Source("rows", {"a": 1})

    @rows.view()
    async def value(key):
        await asyncio.sleep(0)
        return rows[key]

    async with Fabric(rows, workers=2):
        await value("a")
        await rows.settled(rows.set("a", 2), within=5)
        print(await value("a"))

asyncio.run(main())
"""


def test_an_asyncio_application_needs_no_trio() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", _WITHOUT_TRIO], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("2\n", "")
