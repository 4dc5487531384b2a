"""A cost profile is a table of unit costs; a run's cost is the sum of counts times units."""

from __future__ import annotations

import msgspec
import pytest

from penumbra.hw.costs import CostProfile


@pytest.mark.shows("H11")
def test_a_cost_is_the_sum_of_counts_times_unit_costs() -> None:
    profile = CostProfile(source="a test", progress=3, exit=100, walk_read=7)
    assert profile.cost({"progress": 2, "exit": 5, "walk_read": 11}) == 2 * 3 + 5 * 100 + 11 * 7
    assert profile.cost({}) == 0


@pytest.mark.shows("H11")
def test_counters_without_a_price_cost_nothing_and_a_source_is_no_price() -> None:
    assert CostProfile().cost({"psc_hit": 10**9, "source": 3, "no such counter": 1}) == 0


@pytest.mark.shows("H11")
def test_every_price_counts_under_its_own_name() -> None:
    names = [name for name in CostProfile.__struct_fields__ if name != "source"]
    profile = CostProfile(source="a test", **{name: 10**i for i, name in enumerate(names)})
    assert profile.cost(dict.fromkeys(names, 1)) == sum(10**i for i in range(len(names)))


@pytest.mark.shows("H11")
def test_a_profile_names_its_source_and_refuses_a_price_it_does_not_know() -> None:
    assert CostProfile().source
    with pytest.raises(msgspec.ValidationError, match="unknown field `exits`"):
        msgspec.convert({"exits": 5}, CostProfile)
    with pytest.raises(msgspec.ValidationError, match="Expected `int`"):
        msgspec.convert({"exit": "dear"}, CostProfile)
    with pytest.raises(msgspec.ValidationError, match="Expected `int` >= 0"):
        msgspec.convert({"exit": -1}, CostProfile)
