"""Messages between actors: what typed, encoded, bounded, supervised and dispatched costs.

tell: one-way messages to a live consumer, bound 64, until the last has been handled, or, with keys,
superseded. ask: one question at a time, its reply awaited, the codec both ways.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import process_time
from typing import Any

import anyio
import raw
from harness import Kind, Line, Opener, Row, Sampler, Side, Unavailable, pair, sides
from raw import BOUND, MESSAGE, N_ASKS, N_TELLS, Message

from penumbra.actors.runtime import Actor, ActorSystem, AsyncActor, Coalesce, Mailbox

Measurement = Callable[[], Awaitable[float]]

LOOPS: dict[str, dict[str, Any]] = {
    "trio": {"backend": "trio"},
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
}


class Echo(Actor[Message, Message]):
    def receive(self, message: Message) -> Message:
        return message


class Sink(Actor[Message, None]):
    def receive(self, message: Message) -> None:
        return None


class KeyedSink(Sink):
    overflow = Coalesce(lambda message: message.gpa)


class AsyncEcho(AsyncActor[Message, Message]):
    async def receive(self, message: Message) -> Message:
        return message


async def mailbox_tell() -> float:
    mailbox = Mailbox[Message](Message, bound=BOUND)

    async def send_all() -> None:
        for _ in range(N_TELLS):
            await mailbox.send(MESSAGE)
        mailbox.close()

    n_seen = 0
    start = process_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send_all)
        while batch := await mailbox.drain():
            n_seen += len(batch)
    assert n_seen == N_TELLS
    return (process_time() - start) / N_TELLS


async def actor_tell() -> float:
    async with ActorSystem("benchmark") as system:
        ref = system.supervise("all").spawn(Sink, bound=BOUND)
        start = process_time()
        for _ in range(N_TELLS):
            await ref.send(MESSAGE)
        await system.wait_quiet()
        return (process_time() - start) / N_TELLS


async def keyed_tell() -> float:
    messages = [Message(1, 2, 3, page << 12, 0xDEAD_BEEF) for page in range(BOUND)]
    async with ActorSystem("benchmark") as system:
        ref = system.supervise("all").spawn(KeyedSink, bound=BOUND)
        start = process_time()
        for i in range(N_TELLS):
            await ref.send(messages[i % BOUND])
        await system.wait_quiet()
        return (process_time() - start) / N_TELLS


def ask(actor: type[Echo] | type[AsyncEcho], **how: Any) -> Measurement:
    """Return a measurement of asks of an actor; `how` goes to `ask`."""

    async def measurement() -> float:
        async with ActorSystem("benchmark") as system:
            ref = system.spawn(actor())
            start = process_time()
            for _ in range(N_ASKS):
                await ref.ask(MESSAGE, **how)
            return (process_time() - start) / N_ASKS

    return measurement


async def ask_nowait() -> float:
    async with ActorSystem("benchmark") as system:
        ref = system.spawn(Echo())
        start = process_time()
        for _ in range(N_ASKS):
            ref.ask_nowait(MESSAGE)
        return (process_time() - start) / N_ASKS


def on(loop: str, measurement: Measurement) -> Side:
    return lambda: anyio.run(measurement, **LOOPS[loop])


def against(yardstick: Side, measurement: Measurement, loop: str) -> Opener:
    """Return the opener of a row on one event loop."""
    if loop != "uvloop":
        return sides(yardstick, on(loop, measurement))

    @contextmanager
    def opened() -> Iterator[Sampler]:
        if importlib.util.find_spec("uvloop") is None:
            raise Unavailable("uvloop is not installed (extra `bench`)")
        yield pair(yardstick, on(loop, measurement))

    return opened


def tell_row(name: str, loop: str, measurement: Measurement, reach: float | None, what: str) -> Row:
    text = f"{what} on {loop} ÷ raw trio channel"
    return Row(f"messages/{name}", text, Kind.SPEED, reach, against(raw.tell, measurement, loop))


def queue_row(loop: str, reach: float | None) -> Row:
    text = f"actor tell ÷ asyncio.Queue, both on {loop}"
    yardstick = on(loop, raw.queue_tells)
    opener = against(yardstick, actor_tell, loop)
    return Row(f"messages/tell-{loop}-queue", text, Kind.SPEED, reach, opener)


def ask_row(name: str, loop: str, measurement: Measurement, reach: float | None, what: str) -> Row:
    text = f"ask {what} on {loop} ÷ raw trio ask"
    return Row(f"messages/{name}", text, Kind.TIME, reach, against(raw.ask, measurement, loop))


IDLE = ask(Echo)
QUEUED = ask(Echo, inline=False)
TIMED = ask(Echo, inline=False, within=10.0)
AWAITING = ask(AsyncEcho)

LINES: tuple[Line, ...] = (
    tell_row("tell-trio", "trio", actor_tell, 9.0, "actor tell"),
    tell_row("tell-asyncio", "asyncio", actor_tell, 10.0, "actor tell"),
    tell_row("tell-uvloop", "uvloop", actor_tell, None, "actor tell"),
    queue_row("uvloop", 1.0),
    queue_row("asyncio", None),
    tell_row("mailbox-trio", "trio", mailbox_tell, None, "a mailbox without an actor"),
    tell_row("mailbox-asyncio", "asyncio", mailbox_tell, None, "a mailbox without an actor"),
    tell_row("keyed-trio", "trio", keyed_tell, None, "actor tell, 64 keys"),
    ask_row("ask-idle", "trio", IDLE, 0.08, "of an idle actor"),
    ask_row("ask-idle-asyncio", "asyncio", IDLE, None, "of an idle actor"),
    ask_row("ask-nowait", "trio", ask_nowait, None, "without await"),
    ask_row("ask-queued", "trio", QUEUED, None, "by the queue"),
    ask_row("ask-timed", "trio", TIMED, 1.8, "by the queue with a time-out"),
    ask_row("ask-timed-asyncio", "asyncio", TIMED, None, "by the queue with a time-out"),
    ask_row("ask-async", "trio", AWAITING, None, "of an async actor"),
)  # fmt: skip
