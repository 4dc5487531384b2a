"""A mailbox behind the interfaces of anyio and of trio."""

from __future__ import annotations

import anyio
import msgspec
import pytest
import trio
import trio.testing
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from penumbra.actors.runtime import Mailbox, open_streams
from penumbra.actors.runtime.trio_channels import open_channels


class Note(msgspec.Struct, array_like=True):
    n: int


@pytest.mark.anyio
@pytest.mark.shows("K2")
async def test_a_mailbox_serves_as_a_pair_of_object_streams() -> None:
    mailbox = Mailbox[Note](Note, bound=3)
    seen: list[int] = []
    sending, receiving = open_streams(mailbox)
    assert isinstance(sending, ObjectSendStream)
    assert isinstance(receiving, ObjectReceiveStream)

    async def send_all() -> None:
        async with sending:
            for n in range(20):
                await sending.send(Note(n))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send_all)
        seen = [note.n async for note in receiving]
    assert seen == list(range(20))
    assert mailbox.statistics().delivered == 20


@pytest.mark.shows("K2")
@pytest.mark.anyio
async def test_no_object_crosses_a_stream() -> None:
    sending, receiving = open_streams(Mailbox[Note](Note))
    note = Note(1)
    await sending.send(note)
    note.n = 2
    assert await receiving.receive() == Note(1)


@pytest.mark.anyio
@pytest.mark.shows("K4")
async def test_a_cancelled_receive_loses_nothing() -> None:
    mailbox = Mailbox[Note](Note)
    sending, receiving = open_streams(mailbox)
    seen: list[int] = []
    for n in range(6):
        await sending.send(Note(n))
    mailbox.close()
    while len(seen) < 6:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await receiving.receive()
        assert scope.cancelled_caught
        seen.append((await receiving.receive()).n)
    assert seen == list(range(6))
    with pytest.raises(anyio.EndOfStream):
        await receiving.receive()


@pytest.mark.anyio
async def test_a_closed_end_says_so_and_so_does_the_other() -> None:
    sending, receiving = open_streams(Mailbox[Note](Note))
    await receiving.aclose()
    with pytest.raises(anyio.ClosedResourceError):
        await receiving.receive()
    with pytest.raises(anyio.BrokenResourceError):
        await sending.send(Note(1))
    await sending.aclose()
    with pytest.raises(anyio.ClosedResourceError):
        await sending.send(Note(1))


@pytest.mark.anyio
async def test_a_sender_waiting_for_room_learns_that_the_receiver_has_gone() -> None:
    sending, receiving = open_streams(Mailbox[Note](Note, bound=1))
    await sending.send(Note(1))

    async def send_more() -> None:
        with pytest.raises(anyio.BrokenResourceError):
            await sending.send(Note(2))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send_more)
        await anyio.wait_all_tasks_blocked()
        await receiving.aclose()


@pytest.mark.trio
@pytest.mark.shows("K2", "K7")
async def test_a_mailbox_serves_as_a_pair_of_trio_channels() -> None:
    sending, receiving = open_channels(Mailbox[Note](Note, bound=3))
    assert isinstance(sending, trio.abc.SendChannel)
    assert isinstance(receiving, trio.abc.ReceiveChannel)

    async def send_all() -> None:
        async with sending:
            for n in range(20):
                await sending.send(Note(n))
        with pytest.raises(trio.ClosedResourceError):
            await sending.send(Note(99))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        seen = [note.n async for note in receiving]
        assert seen == list(range(20))


@pytest.mark.trio
async def test_trio_channels_raise_the_errors_of_trio() -> None:
    mailbox = Mailbox[Note](Note)
    sending, receiving = open_channels(mailbox)
    async with trio.open_nursery() as nursery:

        async def receive_to_the_end() -> None:
            with pytest.raises(trio.EndOfChannel):
                await receiving.receive()

        nursery.start_soon(receive_to_the_end)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await receiving.receive()
        mailbox.close()
    await receiving.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await receiving.receive()
    with pytest.raises(trio.BrokenResourceError):
        await sending.send(Note(1))
