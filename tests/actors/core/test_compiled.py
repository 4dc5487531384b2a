"""The slot functions, compiled from the same source, leave the same words."""

from __future__ import annotations

import random
from types import FunctionType
from typing import Any

import numpy as np
import pytest

from penumbra.actors.core import InUse, Layout, slots

numba = pytest.importorskip("numba")

FUNCTIONS = ("ring", "coalesce_unversioned", "post", "copy_slot", "copy_new")
INT = numba.types.int64
KEY = numba.types.UniTuple(INT, 2)


def compiled() -> dict[str, Any]:
    """Compile the functions over a copy of their module's names."""
    names: dict[str, Any] = dict(vars(slots))
    for name in FUNCTIONS:
        code = getattr(slots, name).__code__
        names[name] = numba.njit(FunctionType(code, names))
    return names


@pytest.mark.shows("P7")
def test_compiled_and_plain_posts_and_copies_agree_word_for_word() -> None:
    layout = Layout(2, 4, InUse.FIELD)
    channel = layout.channel(0, 1)
    plain, fast = (np.zeros(layout.n_words, np.int64) for _ in range(2))
    code = compiled()
    hint: dict[tuple[int, int], int] = {}
    keys = [(-1, -1)] * 4
    fast_hint = numba.typed.Dict.empty(KEY, INT)
    fast_keys = numba.typed.List(keys)
    draw = random.Random(11)
    outcomes = set()
    for round_ in range(1, 200):
        what = (0x1000, 8 * draw.randrange(6), round_, round_, 1, 0)
        outcome = slots.post(plain, channel, hint, keys, *what)
        assert code["post"](fast, channel, fast_hint, fast_keys, *what) == outcome
        assert (plain == fast).all()
        outcomes.add(outcome)
        if not round_ % 7:
            tail = int(plain[channel[1] + 1])
            copies: list[int] = []
            fast_copies = numba.typed.List.empty_list(INT)
            slots.copy_new(plain, channel, 0, tail, {}, 0, copies)
            code["copy_new"](
                fast, channel, 0, tail, numba.typed.Dict.empty(INT, KEY), 0, fast_copies
            )
            assert list(fast_copies) == copies
            for words in (plain, fast):
                words[channel[3] :: channel[4]][:4] = 0
    assert outcomes == {0, 1, 2}
