"""The layout: every shared word has one place and one name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.actors.core import InUse, Layout

LAYOUTS = st.builds(Layout, st.integers(1, 5), st.integers(1, 9), st.sampled_from(InUse))


@given(LAYOUTS)
@pytest.mark.shows("P1", "P2")
def test_no_two_words_share_an_address_and_all_lie_below_n_words(layout: Layout) -> None:
    used = [0]
    for i in range(layout.n):
        used += range(layout.pending(i), layout.pending(i) + 7)
        for j in range(layout.n):
            bell, header, slots, marks, stride, capacity = layout.channel(i, j)
            used += [bell, header, header + 1]
            words_of_slots = {slots + 8 * k + field for k in range(capacity) for field in range(6)}
            used += words_of_slots
            used += {marks + stride * k for k in range(capacity)} - words_of_slots
    assert len(used) == len(set(used))
    assert max(used) < layout.n_words


@given(LAYOUTS)
def test_every_word_has_a_name_of_its_own(layout: Layout) -> None:
    names = [layout.name(at) for at in range(layout.n_words)]
    telling = [name for name in names if name[0] not in "[u"]
    assert len(telling) == len(set(telling))


def test_names_say_producer_consumer_and_slot() -> None:
    layout = Layout(2, 3)
    bell, header, slots, marks, stride, _ = layout.channel(0, 1)
    assert layout.name(0) == "count"
    assert layout.name(layout.pending(1)) == "pending[1]"
    assert layout.name(bell) == "bell[0>1]"
    assert [layout.name(header + word) for word in range(2)] == ["lost[0>1]", "tail[0>1]"]
    assert layout.name(slots + 8 * 2 + 3) == "derived[0>1:2]"
    assert layout.name(marks + 2 * stride) == "in_use[0>1:2]"


@pytest.mark.shows("P1", "Fig 9 394F", "A40 ¶101")
def test_the_in_use_indicator_may_stand_in_three_places() -> None:
    field, base, outside = (Layout(1, 2, form).channel(0, 0) for form in InUse)
    assert field[3] == field[2] + 6
    assert base[3] == base[2] + 1
    assert outside[3] >= outside[2] + 2 * 8
    assert outside[4] == 1


def test_a_matrix_without_producers_or_slots_is_refused() -> None:
    for n, capacity in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Layout(n, capacity)
