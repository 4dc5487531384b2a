"""The world manager alone: which CPU, which world. Source: A40 ¶51-52; model.md, two clocks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.actors.machine.worlds import ON_NO_CPU, Ready, Turn, WorldManager
from penumbra.actors.runtime import Conductor, LowestKey

pytestmark = pytest.mark.shows("V7")


def manager(n_cpus: int, n_worlds: int, *, slice_: int = 100, skew: int = 50) -> WorldManager:
    made = WorldManager(n_cpus, slice_, skew, Conductor(LowestKey(1)))
    for vcpu in range(n_worlds):
        made.add(0, vcpu)
    return made


def turn_of(made: WorldManager, ready: list[Ready]) -> Turn:
    turn = made.next(ready)
    made.check()
    assert turn is not None
    return turn


def test_a_world_keeps_its_cpu_for_its_slice_and_then_the_one_served_least_comes() -> None:
    made = manager(1, 3, slice_=100, skew=10_000)
    progress = [0, 0, 0]
    order = []
    for _ in range(12):
        turn = turn_of(made, [Ready(i, progress[i]) for i in range(3)])
        progress[turn.world.vcpu] += 50
        made.served(turn, 50)
        order.append(turn.world.vcpu)
    pairs = list(zip(order[::2], order[1::2], strict=True))
    assert all(first == second for first, second in pairs), "a slice of 100 is two turns of 50"
    assert progress == [200, 200, 200]


def test_nobody_is_switched_while_there_is_a_cpu_for_each() -> None:
    made = manager(2, 2, slice_=1)
    switches = 0
    for step in range(20):
        turn = turn_of(made, [Ready(0, step), Ready(1, step)])
        switches += turn.switched
        made.served(turn, 10)
    assert switches == 2, "each sat down once"


def test_the_cpu_that_is_furthest_behind_goes_first() -> None:
    made = manager(2, 2, skew=10_000)
    first = turn_of(made, [Ready(0, 0), Ready(1, 0)])
    made.served(first, 1000)
    second = turn_of(made, [Ready(0, 1000), Ready(1, 0)])
    assert second.cpu != first.cpu


def test_a_vcpu_waits_while_it_is_further_ahead_than_the_skew_allows() -> None:
    made = manager(1, 2, slice_=10**6, skew=50)
    first = turn_of(made, [Ready(0, 0), Ready(1, 0)]).world.vcpu
    made.served(turn_of(made, [Ready(first, 0), Ready(1 - first, 0)]), 51)
    turn = turn_of(made, [Ready(first, 51), Ready(1 - first, 0)])
    assert turn.world.vcpu == 1 - first
    assert turn.switched


def test_a_sleeping_world_runs_only_when_no_sibling_is_before_its_time() -> None:
    made = manager(2, 2, skew=10**6)
    turn = turn_of(made, [Ready(0, 500, asleep=True), Ready(1, 20)])
    assert turn.world.vcpu == 1
    turn = turn_of(made, [Ready(0, 500, asleep=True)])
    assert turn.world.vcpu == 0


def test_vms_do_not_wait_for_each_other() -> None:
    made = WorldManager(2, 100, 50, Conductor(LowestKey(1)))
    made.add(0, 0)
    made.add(1, 0)
    ran = Counter[int]()
    for _ in range(10):
        turn = turn_of(made, [Ready(0, 10**6), Ready(1, 0)])
        made.served(turn, 10)
        ran[turn.world.vm] += 1
    assert ran == {0: 5, 1: 5}


def test_without_a_world_that_can_go_on_there_is_no_turn() -> None:
    made = manager(2, 2)
    assert made.next([]) is None


def test_a_world_that_leaves_frees_its_cpu() -> None:
    made = manager(1, 2)
    turn = turn_of(made, [Ready(0, 0)])
    made.leave(turn.world)
    assert turn.world.cpu == ON_NO_CPU
    assert turn_of(made, [Ready(1, 0)]).left is None


@settings(max_examples=60, deadline=None)
@given(
    n_cpus=st.integers(1, 4),
    vms=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    slice_=st.integers(1, 500),
    skew=st.integers(0, 500),
    steps=st.lists(st.integers(1, 120), min_size=300, max_size=300),
    seed=st.integers(0, 2**32),
)
def test_nobody_starves_and_no_sibling_runs_ahead(
    n_cpus: int, vms: list[int], slice_: int, skew: int, steps: list[int], seed: int
) -> None:
    made = WorldManager(n_cpus, slice_, skew, Conductor(LowestKey(seed)))
    worlds = [made.add(vm, vcpu) for vm, n in enumerate(vms) for vcpu in range(n)]
    progress = [0] * len(worlds)
    for step in steps:
        turn = made.next([Ready(w.world_id, progress[w.world_id]) for w in worlds])
        made.check()
        assert turn is not None
        mine = turn.world.world_id
        slowest = min(progress[w.world_id] for w in worlds if w.vm == turn.world.vm)
        assert progress[mine] <= slowest + skew
        progress[mine] += step
        made.served(turn, step)
    assert min(progress) > 0
