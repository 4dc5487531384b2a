"""The six races and the rest of the catalogue: listed schedules, then every schedule there is."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.actors.core import SWITCHES, InUse, Order, Postpone
from penumbra.actors.core.order import Kind, Memory
from penumbra.actors.core.races import World
from penumbra.actors.core.scenes import SCENES
from penumbra.actors.core.schedules import ScheduleError, explore, wander
from penumbra.actors.core.stepper import Model

FAULTS = [name for name, switch in SWITCHES.items() if switch.kind is not Kind.VARIANT]
SLOW_TO_ENUMERATE = {"no_entry_lock"}

# What runs: label -> a world small enough for every schedule, on both memories.
SMALL = {
    "one store": World(),
    "two stores of one entry, one event between": World(stores=("x1 x2",)),
    "1, 2, 1": World(stores=("x1 x2 x1",), monotone=False),
    "two entries": World(stores=("x1 y1",), capacity=2),
    "two entries, one slot, lost mark": World(stores=("x1 y1",)),
    "one store that touches two entries": World(stores=("xy1",), capacity=2),
    "uncovered, left in the channel": World(stores=("x1 x2",), free_covers=""),
    "uncovered, kept in the store": World(
        stores=("x1 x2",), free_covers="", postpone=Postpone.IN_STORE
    ),
    "one of two entries covered": World(stores=("x1 y1",), capacity=2, free_covers="y"),
    "two producers": World(stores=("x1", "x2"), monotone=False),
    "a trace placer that asks": World(placer="asks"),
    "a trace placer that writes": World(placer="writes"),
    "in use in the base": World(stores=("x1 x2",), in_use=InUse.BASE),
    "in use outside": World(stores=("x1 x2",), in_use=InUse.OUTSIDE),
    "bell as a flag": World(stores=("x1 x2",), order=Order.BELL_FLAG),
    "837 voids": World(stores=("x1 x2",), order=Order.VOID_ON_COALESCE),
    "no coalescing, no fence": World(
        stores=("x1 x2",), capacity=2, order=SWITCHES["no_coalescing"].order
    ),
}


@pytest.mark.shows("P9", "P7")
@pytest.mark.parametrize("name", FAULTS)
def test_the_listed_schedule_goes_wrong_with_the_fault(name: str) -> None:
    scene = SCENES[name]
    assert scene.play(scene.fault) == scene.wrong


@pytest.mark.shows("P9", "P7")
@pytest.mark.parametrize("name", FAULTS)
def test_the_listed_schedule_is_right_or_impossible_without_the_fault(name: str) -> None:
    scene = SCENES[name]
    if scene.forbids:
        with pytest.raises(ScheduleError) as refused:
            scene.play(scene.right)
        assert str(refused.value) == scene.forbids
    else:
        assert scene.play(scene.right) is None


@pytest.mark.shows("P9", "P7")
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in SLOW_TO_ENUMERATE])
def test_among_all_schedules_only_those_with_the_fault_go_wrong(name: str) -> None:
    scene, switch = SCENES[name], SWITCHES[name]
    program = scene.world.with_order(scene.fault).program()
    with_fault = explore(program, scene.model)
    assert with_fault.n_failing > 0
    assert with_fault.n_failing < with_fault.n_schedules or scene.world.n_free == 0
    assert explore(scene.world.with_order(scene.right).program(), scene.model).n_failing == 0
    if switch.shows is Memory.TSO:
        assert explore(program, Model.SC).n_failing == 0, "it takes store buffers to show"


@pytest.mark.shows("P7", "P9", "A40c 55", "A40c 65", "A40c 71", "A40 ¶120")
@pytest.mark.parametrize("model", Model)
@pytest.mark.parametrize("label", SMALL)
def test_no_schedule_of_a_small_world_goes_wrong(label: str, model: Model) -> None:
    verdict = explore(SMALL[label].program(), model)
    assert (verdict.n_failing, verdict.failure) == (0, "")
    assert verdict.n_schedules > 1000


@pytest.mark.shows("A40c 62", "A40c 68", "A40c 74", "V4")
def test_two_consumers_of_one_copy_never_leave_it_older_than_what_one_has_seen() -> None:
    world = SCENES["no_entry_lock"].world
    assert explore(world.program()).n_failing == 0


LARGE = World(stores=("x1 y1 x2", "y3 x3"), n_consumers=2, n_free=2, capacity=1, monotone=False)


@pytest.mark.shows("P7", "P10")
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(Model),
    st.sampled_from(InUse),
    st.sampled_from(Postpone),
    st.sampled_from([1, 2]),
    st.sampled_from(["", "x", "xyz"]),
    st.randoms(use_true_random=False),
)
def test_random_schedules_of_a_larger_world_stay_right(
    model: Model,
    in_use: InUse,
    postpone: Postpone,
    capacity: int,
    covers: str,
    draw: Random,
) -> None:
    world = replace(LARGE, in_use=in_use, postpone=postpone, capacity=capacity, free_covers=covers)
    program = world.program()
    end, schedule = wander(program, draw.randrange, model)
    assert program.judge(end) is None, schedule


def test_every_switch_is_one_order_and_every_fault_has_a_scene() -> None:
    bits = Order.CORRECT
    for switch in SWITCHES.values():
        bits |= switch.order
    assert bits == ~Order.CORRECT
    assert list(SCENES) == FAULTS
    assert {SWITCHES[name].race for name in FAULTS} == {0, 1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_says_in_one_line_what_it_does_and_where(name: str) -> None:
    switch = SWITCHES[name]
    assert switch.order is not Order.CORRECT
    assert 20 <= len(switch.line) <= 100
    assert switch.place.split()[0] in ("producer", "consumer", "shared")
