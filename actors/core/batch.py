"""Many stores in one call: the producer's steps for each, from one source, plain or compiled.

Where primary data are words themselves (machine memory, a fabric's shared words) a producer can
make a whole column of stores, each with its own P1-P9: pending, the store, its patch, the bell, and
pending again. The steps are those of `slots`; compiled by numba they cost a fiftieth of what a call
of Python per step costs. Without numba the same functions run plain and leave the same words.

    matrix = Matrix(n, capacity, Layout(n, capacity).new_array())
    batch = Batch(matrix.producer(0))
    done = batch.post_batch(1, primary, at, values, base, offsets, derived, count)

Compiled code sees words as signed 64-bit integers: the same bits, and sums that stay integers.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

from penumbra.actors.core import slots
from penumbra.actors.core.order import Order
from penumbra.actors.core.patch import Outcome, ProtocolError
from penumbra.actors.core.producer import _IDLE, _NOTHING, _STORED, Producer
from penumbra.actors.core.slots import post
from penumbra.actors.core.words import Channel, Words

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Column = npt.NDArray[np.int64] | npt.NDArray[np.uint64]

_FULL = int(Outcome.FULL)
_NO_PENDING = int(Order.NO_PENDING)
# The order of a batch is P1-P9; these put a step elsewhere than the loop below has it.
_MOVED = Order.PENDING_AFTER_STORE | Order.PENDING_CLEARED_EARLY

_MASK64 = (1 << 64) - 1


def post_batch(
    words: Words,
    pending: int,
    channel: Channel,
    hint: dict[tuple[int, int], int],
    keys: list[tuple[int, int]],
    order: int,
    sequence: int,
    primary: Words,
    at: Any,
    values: Any,
    base: int,
    offsets: Any,
    derived: Any,
    usefulness: int,
    tally: Any,
) -> int:
    """Make stores and post each to one channel; return how many are done.

    It stops behind a store whose post found the channel full: that one is made and pending, told to
    nobody. `tally` counts outcomes by their codes.

    Source: A40 Fig. 11, steps 830-848.
    """
    n = len(at)
    for i in range(n):
        sequence += 1
        if not order & _NO_PENDING:  # P1
            words[pending + 1] = base
            words[pending + 2] = offsets[i]
            words[pending] = sequence << 2 | 1
        primary[at[i]] = values[i]  # 831
        code = post(
            words, channel, hint, keys, base, offsets[i], derived[i], values[i], usefulness, order
        )
        tally[code] += 1
        if code == _FULL:
            return i
        if not order & _NO_PENDING:
            words[pending] = 0  # 848
    return n


@cache
def _compiled() -> Callable[..., int]:
    """Compile `post_batch` and the functions of `slots` it stands on, into numba's cache.

    Numba renews a cache entry when the function's own file changes; these depend on two files and
    on the words' layout, so a digest of all is part of the name.
    """
    import numba

    digest = hashlib.blake2b(digest_size=6)
    for source in ("batch.py", "slots.py", "order.py", "patch.py", "words.py"):
        digest.update(Path(__file__).with_name(source).read_bytes())
    names: dict[str, Any] = {**vars(slots), **globals()}
    for function in (slots.ring, slots.coalesce_unversioned, slots.post, post_batch):
        copy = FunctionType(function.__code__, names, function.__name__)
        copy.__qualname__ = f"{digest.hexdigest()}.{function.__name__}"
        names[function.__name__] = numba.njit(cache=True, nogil=True)(copy)
    return names["post_batch"]  # type: ignore[no-any-return]


class Batch:
    """A producer's door for columns of stores, to one consumer at a time.

    Plain posts and batches may alternate; each side then forgets which slot holds which entry, and
    what it posts next is a second patch beside one still in its channel, which does no harm.

    Not for a producer that needs a fence: between processes every store takes its own.

    Args:
        engine: `numba`, which wants the matrix's words as one piece of memory, or `plain`; None:
            numba if it is installed.

    Raises:
        ValueError: The producer is fenced, its order moves a step of the batch, or its words cannot
            be seen as an array.
    """

    def __init__(self, producer: Producer, engine: Literal["numba", "plain"] | None = None) -> None:
        if producer._fence is not None or producer._order & _MOVED:
            raise ValueError("a batch is for unfenced producers in the order P1-P9")
        if engine is None:
            engine = "numba" if importlib.util.find_spec("numba") else "plain"
        self.engine = engine
        self._producer = producer
        self._hints: dict[int, tuple[Any, Any]] = {}
        self._tallies: dict[int, list[int]] = {}
        self._words: Any = producer._words
        self._int64: Any = None
        self._run: Callable[..., int] = post_batch
        self._total: Any = [0] * len(Outcome)
        if engine == "numba":
            import numpy as np

            if not isinstance(producer._words, memoryview):
                raise ValueError(f"no array over words of type {type(producer._words).__name__}")
            self._int64 = np.dtype(np.int64)
            self._words = np.frombuffer(producer._words, np.int64)
            self._total = np.zeros(len(Outcome), np.int64)
            self._run = _compiled()

    def post_batch(
        self,
        consumer: int,
        primary: Column,
        at: Column,
        values: Column,
        base: int,
        offsets: Column,
        derived: Column,
        count: int,
    ) -> int:
        """Make the stores in turn and tell one consumer of each; return how many are done.

        All columns have one length. If fewer are done, the channel was full (844): the store after
        those done is made and pending, and the caller shoots it down, calls the producer's `end`,
        and goes on behind it.

        Args:
            primary: The primary data, as 64-bit words.
            at: Which word of them each store changes.
            base: Where the words begin, as patches name it; `offsets` say the rest.
            derived: What the producer derived from each value.
            count: The trace count before it derived them.

        Raises:
            ProtocolError: The last store has not ended.
            ValueError: The columns differ in length.
        """
        producer = self._producer
        if producer._phase != _IDLE:
            raise ProtocolError(f"a batch in phase {producer._phase}")
        n = len(at)
        if len(values) != n or len(offsets) != n or len(derived) != n:
            raise ValueError("the columns of a batch differ in length")
        hint, keys = self._hint(consumer)
        run, total, int64 = self._run, self._total, self._int64
        columns: list[Any]
        if int64 is not None:
            base = _signed(base)
            columns = [
                c if c.dtype is int64 else c.view(int64)
                for c in (primary, at, values, offsets, derived)
            ]
        else:
            columns = _plain(primary, at, values, offsets, derived)
        done = run(
            self._words, producer._pending, producer._ends[consumer].channel, hint, keys,
            producer._order, producer._sequence, columns[0], columns[1], columns[2],
            base, columns[3], columns[4], count, total,
        )  # fmt: skip
        self._note(consumer)
        if done < n:
            producer._phase, producer._count = _STORED, count
            producer._sequence += 1
        producer._sequence += done
        return done

    def _note(self, consumer: int) -> None:
        """Add the outcomes to the producer's own."""
        tally = self._producer._ends[consumer].tally
        for code, n in enumerate(self._total):
            if n:
                tally[code] += int(n)
                self._total[code] = 0
        self._tallies[consumer] = tally.copy()

    def _hint(self, consumer: int) -> tuple[Any, Any]:
        """Return this batch's hints, empty if plain posts came in between; empty theirs."""
        end = self._producer._ends[consumer]
        if self._tallies.get(consumer) != end.tally:
            self._hints[consumer] = self._new_hint(len(end.keys))
        if end.hint:
            end.forget()
        return self._hints[consumer]

    def _new_hint(self, capacity: int) -> tuple[Any, Any]:
        if self.engine == "plain":
            return {}, [_NOTHING] * capacity
        from numba import typed, types

        made: Any = typed  # no checker knows what is in these two
        words: Any = types
        key = words.UniTuple(words.int64, 2)
        keys = made.List.empty_list(key)
        for _ in range(capacity):
            keys.append(_NOTHING)
        return made.Dict.empty(key, words.int64), keys


def _plain(primary: Column, *columns: Column) -> list[Any]:
    """Return primary data as a writable view and columns as lists, of unsigned words both."""
    return [primary.view("u8").data, *(column.view("u8").tolist() for column in columns)]


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value
