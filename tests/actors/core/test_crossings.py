"""Overflow between CPUs that are producers and consumers at once: it ends, and nothing is lost."""

from __future__ import annotations

from random import Random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.actors.core import Channels
from penumbra.actors.core.crossings import Crossing
from penumbra.actors.core.schedules import explore, wander
from penumbra.actors.core.stepper import Model

Policy = Literal["shootdown", "wait", "lost"]
POLICIES: tuple[Policy, ...] = ("shootdown", "wait", "lost")
WAITING: tuple[Policy, ...] = ("shootdown", "wait")
kinds = pytest.mark.parametrize("kind", Channels)


@pytest.mark.shows("P10", "K3", "EP19", "EP9", "A40 ¶109", "A40 ¶128", "Fig 11 844")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", [1, 2])
@kinds
def test_mutual_and_self_overflow_end_and_lose_nothing(
    policy: Policy, n: int, kind: Channels
) -> None:
    verdict = explore(Crossing(n, policy, channels=kind).program(), Model.TSO)
    assert (verdict.n_failing, verdict.failure) == (0, "")
    assert n == 1 or verdict.n_schedules > 1000


@pytest.mark.shows("EP19", "P10")
@pytest.mark.parametrize("n", [1, 2])
@kinds
def test_EP19_as_printed_two_that_shoot_each_other_down_or_one_itself_wait_for_ever(
    n: int, kind: Channels
) -> None:
    for policy in WAITING:
        world = Crossing(n, policy, serves=False, channels=kind)
        verdict = explore(world.program())
        assert verdict.n_failing > 0
        assert verdict.reason == "deadlock"
        assert n > 1 or verdict.n_failing == verdict.n_schedules


@pytest.mark.shows("P10", "EP19")
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.sampled_from(Channels),
    st.sampled_from(Model),
    st.randoms(use_true_random=False),
)
def test_three_that_meet_full_channels_all_get_through(
    policy: Policy, kind: Channels, model: Model, draw: Random
) -> None:
    program = Crossing(3, policy, channels=kind).program()
    end, schedule = wander(program, draw.randrange, model)
    assert program.judge(end) is None, schedule
