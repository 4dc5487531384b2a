"""Tables as plain text."""

from __future__ import annotations

import pytest

from penumbra.actors.console.tables import Grid, count, plain_text


def test_text_stands_left_and_numbers_right_below_heads_of_several_lines() -> None:
    grid = Grid("title", ["name", "TLB\nmisses", "n"], [["a", "1", ("12,345", "red")]])
    assert plain_text(grid).splitlines() == [
        "title",
        "         TLB",
        "name  misses       n",
        "a          1  12,345",
    ]


def test_only_a_last_column_of_text_is_ever_folded() -> None:
    grid = Grid("", ["name", "n", "why"], [["a", "1", "x" * 90]], last_left=True)
    assert (grid.foldable(), grid.least_width()) == ([2], 4 + 1 + 24 + 3 * 2)
    assert Grid("", ["name", "n"]).foldable() == []


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999_999, "999,999"),
        (1_000_000, "1.00 M"),
        (123_456_789, "123.5 M"),
        (2_500_000_000, "2.50 G"),
        (10**12, "1.00 T"),
    ],
)
def test_counts_take_at_most_seven_places(n: int, text: str) -> None:
    assert count(n) == text
    assert len(text) <= 7
