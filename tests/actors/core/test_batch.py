"""Many stores in one call leave the words that one call per step leaves, plain or compiled."""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pytest

from penumbra.actors.core import ATOMIC, Layout, Matrix, Order, Outcome, ProtocolError
from penumbra.actors.core.batch import Batch
from penumbra.actors.core.shared_words import ProcessPorts

Engine = Literal["numba", "plain"]
ENGINES: tuple[Engine, ...] = ("plain", "numba") if find_spec("numba") else ("plain",)
BASE = 0x7000
HIGH = 1 << 63  # an entry with NX: bit 63 is a bit like others

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def matrix_of(capacity: int, **how: Any) -> Matrix:
    """Return a matrix of two whose words compiled code can work on."""
    return Matrix(2, capacity, Layout(2, capacity).new_array(), **how)


def columns(draw: random.Random, n: int, n_entries: int) -> list[Any]:
    """Return where, values, offsets and derived values of some stores."""
    where = [draw.randrange(n_entries) for _ in range(n)]
    values = [draw.choice((0, HIGH)) | draw.randrange(1 << 52) for _ in where]
    as_words = [np.array(column, np.uint64) for column in (where, values)]
    return [
        as_words[0].view(np.int64),
        as_words[1],
        as_words[0] * np.uint64(8),
        as_words[1] ^ np.uint64(HIGH | 4),
    ]


def step_by_step(matrix: Matrix, primary: Any, where: Any, values: Any, derived: Any) -> int:
    """Make the stores by the producer's own calls; return how many are done."""
    producer = matrix.producer(0)
    for done, (at, value, copy) in enumerate(zip(where, values, derived, strict=True)):
        offset = 8 * int(at)
        producer.begin(((BASE, offset),))
        primary[at] = value
        producer.stored()
        outcome = producer.post_nowait(1, BASE, offset, int(copy), int(value))
        if outcome is Outcome.FULL:
            return done
        producer.end()
    return len(where)


def words_of(matrix: Matrix) -> list[int]:
    return [matrix.words[at] for at in range(matrix.layout.n_words)]


@pytest.mark.shows("P3", "P7")
@pytest.mark.parametrize("order", [Order.CORRECT, ATOMIC, Order.NO_COALESCING, Order.BELL_FLAG])
def test_a_batch_leaves_every_word_as_the_single_steps_do(engine: Engine, order: Order) -> None:
    draw = random.Random(5)
    one, many = (matrix_of(8, order=order) for _ in range(2))
    batch = Batch(many.producer(0), engine)
    first, second = (np.zeros(16, np.uint64) for _ in range(2))
    stopped = 0
    for round_ in range(60):
        where, values, offsets, derived = columns(draw, draw.randrange(1, 12), 12)
        done = step_by_step(one, first, where, values, derived)
        assert done == batch.post_batch(
            1, second, where, values, BASE, offsets, derived, many.count
        )
        assert words_of(one) == words_of(many)
        assert (first == second).all()
        assert one.producer(0).tally(1) == many.producer(0).tally(1)
        if done < len(where):
            stopped += 1
            for matrix in (one, many):
                matrix.consumer(1).drop_all()
                matrix.producer(0).end()
        if round_ % 3 == 0:
            assert one.consumer(1).event().patches == many.consumer(1).event().patches
        one.check()
        many.check()
    assert stopped
    posted, coalesced, full = many.producer(0).tally(1)
    assert posted
    assert full
    assert bool(coalesced) is not bool(order & Order.NO_COALESCING)


@pytest.mark.shows("P3", "P10")
def test_a_batch_stops_behind_the_store_that_the_full_channel_did_not_take(engine: Engine) -> None:
    matrix = matrix_of(2)
    producer = matrix.producer(0)
    primary = np.zeros(4, np.int64)
    at = np.arange(4)
    done = Batch(producer, engine).post_batch(1, primary, at, at + 1, BASE, at, at, 1)
    assert done == 2
    assert primary.tolist() == [1, 2, 3, 0]
    # The third store is pending: an event finds it although no patch names it.
    patches = matrix.consumer(1).event().patches
    assert sorted((patch.offset, patch.number) for patch in patches) == [(0, 0), (1, 1), (2, -1)]
    producer.end()
    assert matrix.consumer(1).event().patches == []


@pytest.mark.shows("P3")
def test_plain_posts_and_batches_alternate_without_coalescing_into_anothers_slot(
    engine: Engine,
) -> None:
    draw = random.Random(9)
    matrix = matrix_of(32)
    producer, consumer = matrix.producer(0), matrix.consumer(1)
    batch = Batch(producer, engine)
    primary = np.zeros(8, np.uint64)
    for _ in range(200):
        where, values, offsets, derived = columns(draw, draw.randrange(1, 6), 8)
        if draw.random() < 0.5:
            step_by_step(matrix, primary, where, values, derived)
        else:
            batch.post_batch(1, primary, where, values, BASE, offsets, derived, matrix.count)
        matrix.check()
        changed = {8 * int(at) for at in where}
        if draw.random() < 0.4:
            told = consumer.event().patches
            assert changed <= {patch.offset for patch in told}
            usable = [p for p in told if consumer.usable(p, int(primary[p.offset // 8]))]
            assert changed <= {patch.offset for patch in usable}
            assert all(patch.derived == patch.source ^ (HIGH | 4) for patch in usable)


@pytest.mark.shows("P9")
def test_a_derived_value_older_than_the_last_trace_is_posted_and_not_used(engine: Engine) -> None:
    matrix = matrix_of(4)
    count = matrix.count
    matrix.place_trace()
    primary, at = np.zeros(1, np.int64), np.zeros(1, np.int64)
    Batch(matrix.producer(0), engine).post_batch(1, primary, at, at, BASE, at, at, count)
    [patch] = matrix.consumer(1).event().patches
    assert not matrix.consumer(1).usable(patch, 0)


def test_what_a_batch_cannot_do_is_refused(engine: Engine) -> None:
    fenced = Matrix(2, 4, ports=ProcessPorts())
    with pytest.raises(ValueError, match="unfenced"):
        Batch(fenced.producer(0), engine)
    moved = matrix_of(4, order=Order.PENDING_AFTER_STORE)
    with pytest.raises(ValueError, match="order P1-P9"):
        Batch(moved.producer(0), engine)
    if engine == "numba":
        with pytest.raises(ValueError, match="no array over words of type list"):
            Batch(Matrix(2, 4).producer(0), engine)
    matrix = matrix_of(4)
    batch = Batch(matrix.producer(0), engine)
    at = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="differ in length"):
        batch.post_batch(1, at, at, at[:1], BASE, at, at, 1)
    matrix.producer(0).begin([(BASE, 0)])
    with pytest.raises(ProtocolError, match="a batch in phase 1"):
        batch.post_batch(1, at, at, at, BASE, at, at, 1)
