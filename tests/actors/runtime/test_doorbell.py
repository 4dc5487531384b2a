"""The doorbell, with one process at both ends."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from penumbra.actors.runtime.doorbell import Doorbell


@pytest.fixture(params=["eventfd", "pipe"])
def bell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Doorbell]:
    """Make a bell of either kind."""
    if request.param == "pipe":
        monkeypatch.delattr("os.eventfd", raising=False)
    made = Doorbell()
    yield made
    made.close()


def test_any_number_of_rings_is_one(bell: Doorbell) -> None:
    assert not bell.wait(0)
    for _ in range(20_000):  # more than a pipe holds
        bell.ring()
    assert bell.wait()
    assert not bell.wait(0)


def test_a_ring_before_the_wait_is_not_lost(bell: Doorbell) -> None:
    bell.ring()
    assert bell.wait(60)
    bell.ring()
    bell.clear()
    assert not bell.wait(-1)


@pytest.mark.anyio
async def test_a_cancelled_wait_leaves_the_bell_as_it_was(bell: Doorbell) -> None:
    with anyio.move_on_after(0) as scope:
        await bell.wait_rung()
    assert scope.cancelled_caught
    bell.ring()
    with anyio.fail_after(60):
        await bell.wait_rung()
    assert not bell.wait(0)


@pytest.mark.anyio
async def test_a_task_is_woken_by_a_later_ring(bell: Doorbell) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bell.wait_rung)
        await anyio.wait_all_tasks_blocked()
        bell.ring()
    assert not bell.wait(0)
