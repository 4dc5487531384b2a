"""A patch is words in shared memory until it is drained; then it is a message like any other."""

from __future__ import annotations

import msgspec
import pytest

from penumbra.actors.core import Matrix, Patch


@pytest.mark.shows("K2", "P1")
def test_what_a_consumer_drains_crosses_as_messages_and_shares_no_object() -> None:
    matrix = Matrix(2, 4)
    producer = matrix.producer(0)
    keys = [(0x5000, 8), (0x6000, 16)]
    producer.begin(keys)
    producer.stored()
    for number, (base, offset) in enumerate(keys):
        producer.post_all(0b10, base, offset, 0x9000 + number, 0x7000 + number)
    producer.end()
    drained = matrix.consumer(1).event().patches
    assert [(patch.base, patch.offset) for patch in drained] == keys
    sent = msgspec.msgpack.encode(drained)
    received = msgspec.msgpack.decode(sent, type=list[Patch])
    assert received == drained
    assert all(one is not other for one, other in zip(received, drained, strict=True))
    assert [(patch.derived, patch.source, patch.producer) for patch in received] == [
        (0x9000, 0x7000, 0),
        (0x9001, 0x7001, 0),
    ]
