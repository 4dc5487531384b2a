"""Shared words, and the ports of one process among several."""

from __future__ import annotations

import platform

import pytest

from penumbra.actors.core import Matrix, Order, Outcome, ProtocolError
from penumbra.actors.core.shared_words import (
    FENCED,
    UNFENCED,
    ProcessPorts,
    SharedWords,
    UnorderedMemory,
    stores_are_ordered,
)

ordered = pytest.mark.skipif(
    not stores_are_ordered(), reason="plain stores have no order on this machine"
)


def test_what_one_attachment_stores_the_other_loads() -> None:
    created = SharedWords.create(1000)
    attached = SharedWords.attach(created.name, 1000)
    assert created.words.tolist() == [0] * 1000
    created.words[999] = (1 << 64) - 1
    attached.words[0] = 7
    assert (attached.words[999], created.words[0]) == ((1 << 64) - 1, 7)
    attached.close()
    assert created.words[0] == 7
    created.close()
    with pytest.raises(FileNotFoundError):
        SharedWords.attach(created.name, 1000)


def test_words_that_are_too_few_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match="n_words = 0: must be at least 1"):
        SharedWords.create(0)
    created = SharedWords.create(1)
    with pytest.raises(ValueError, match="not 1000000"):
        SharedWords.attach(created.name, 1_000_000)
    created.close()


@ordered
@pytest.mark.parametrize("order", [UNFENCED, FENCED], ids=["unfenced", "fenced"])
@pytest.mark.shows("P7", "A40c 57", "A40c 58", "A40c 59")
def test_two_matrices_over_the_same_words_are_one(order: Order) -> None:
    layout = Matrix(2, 4).layout
    ours = SharedWords.create(layout.n_words)
    theirs = SharedWords.attach(ours.name, layout.n_words)
    first = Matrix(2, 4, ours.words, ports=ProcessPorts(), order=order)
    second = Matrix(2, 4, theirs.words, ports=ProcessPorts(), order=order)
    producer, consumer = first.producer(0), second.consumer(1)
    for entry in (8, 8, 16):
        producer.begin([(0, entry)])
        producer.stored()
        outcome = producer.post_nowait(1, 0, entry, entry, entry)
        assert outcome in (Outcome.POSTED, Outcome.COALESCED)
        producer.end()
    patches = consumer.event().patches
    assert {patch.offset for patch in patches} == {8, 16}
    assert len(patches) == (3 if order == UNFENCED else 2)
    assert all(consumer.usable(patch, patch.offset) for patch in patches)
    assert first.place_trace() == second.count == 2
    theirs.close()
    ours.close()


@ordered
def test_ports_between_processes_refuse_what_plain_python_cannot_do_at_once() -> None:
    ports, words = ProcessPorts(), memoryview(bytearray(8)).cast("Q")
    ports.fence()
    ports.fence()
    for forbidden in (
        lambda: ports.exchange(words, 0, 1),
        lambda: ports.lock(words, 0),
        lambda: ports.unlock(words, 0),
    ):
        with pytest.raises(ProtocolError, match="between processes"):
            forbidden()
    assert words[0] == 0
    assert (ports.add(words, 0, 3), words[0]) == (3, 3)


def test_on_a_machine_that_orders_less_ports_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UnorderedMemory, match="have no order on aarch64"):
        ProcessPorts()
