"""Messages from one process to another."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from hammer import HANG, SPAWN, Number, count, received

from penumbra.actors.core.shared_words import stores_are_ordered
from penumbra.actors.processes import Line, Receiver, Sender
from penumbra.actors.runtime.errors import NotAccepted

pytestmark = pytest.mark.skipif(
    not stores_are_ordered(), reason="plain stores have no order on this machine"
)


class Other(msgspec.Struct):
    text: str


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line(capacity=4, record_bytes=64)
    yield made
    made.close()


@pytest.mark.shows("P7", "K2")
@pytest.mark.parametrize("n_polls", [0, 64], ids=["always asleep", "polling"])
def test_every_message_offered_arrives_once_and_in_order(line: Line, n_polls: int) -> None:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=count, args=(line.end(), n_polls, theirs), daemon=True)
    process.start()
    sender = Sender[Number](line.end(), Number)
    n, n_full = 0, 0
    while n < 3_000:
        if n % 2:
            n += sender.offer_all(Number(i, "") for i in range(n, n + 3))
        elif sender.offer(Number(n, "x" * (n % 20))):
            n += 1
        else:
            n_full += 1
    while not sender.offer(Number(-1, "")):
        n_full += 1
    assert received(ours) == list(range(n))
    process.join(HANG)
    assert process.exitcode == 0
    assert n_full > 0
    sender.close()


def test_what_is_not_declared_or_too_long_is_not_sent(line: Line) -> None:
    sender, receiver = Sender[Number](line.end(), Number), Receiver[Number](line.end(), Number)
    with pytest.raises(NotAccepted):
        sender.offer(Other("no"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 64"):
        sender.offer(Number(0, "x" * 65))
    with pytest.raises(NotAccepted):
        sender.offer_all([Number(1, ""), Other("no")])  # type: ignore[list-item]
    assert receiver.wait(0)
    assert receiver.drain() == [Number(1, "")]
    assert not receiver.wait(0, n_polls=0)
    sender.close()
    receiver.close()
