"""One listed schedule for each fault of the catalogue: wrong with the fault, right without it.

    scene = SCENES["free_last"]
    scene.play(scene.fault)     # "R keeps x1 for x2"
    scene.play(scene.right)     # None

Schedules are in the language of `schedules`: `A>=x` is "A, up to where it stores x". A scene whose
`forbids` is set has a schedule that the right order makes impossible: there a fence or a lock
stands in its way. The numbers of the races are those of `Switch.race`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from penumbra.actors.core.order import SWITCHES, Order
from penumbra.actors.core.races import World
from penumbra.actors.core.schedules import run_schedule
from penumbra.actors.core.stepper import Model
from penumbra.actors.core.topology import Channels


class Scene(NamedTuple):
    """A world, a schedule, and the memory model on which it is played.

    Attributes:
        wrong: What is wrong at the end when the fault is on.
        right: The order to compare with: without the fault, but with the variant it belongs to.
        forbids: Where the right order blocks the schedule; "" when it plays to the end.
    """

    switch: str
    world: World
    schedule: str
    wrong: str
    model: Model = Model.SC
    right: Order = Order.CORRECT
    forbids: str = ""

    @property
    def fault(self) -> Order:
        return SWITCHES[self.switch].order

    def play(self, order: Order) -> str | None:
        """Play the schedule; return what is wrong at its end, or None.

        Raises:
            ScheduleError: The schedule is impossible in this order.
        """
        program = self.world.with_order(order).program()
        return program.judge(run_schedule(program, self.schedule, self.model))


_FINAL: Final = World(monotone=False)
_ONE: Final = World()
_TWICE: Final = World(stores=("x1 x2",), monotone=False)
_PAIR: Final = World(stores=("x1 y1",), capacity=2, monotone=False)

_ALL: Final = (
    Scene(
        "no_source_compare",
        World(stores=("x2", "x1"), n_free=0, monotone=False),
        "B* A* R*",  # B is the older; A's channel is read first
        "R keeps x1 for x2",
    ),
    Scene("free_last", _TWICE, "A>=x A A>=x  R>=in_use  A*  R*", "R keeps x1 for x2"),
    Scene(
        "no_version",
        World(stores=("x1 x2 x1",), monotone=False),
        "A>=x A A>=x A A>=source  R>source  A*  R*",
        "R keeps x2 for x1",
    ),
    Scene("no_pending", _ONE, "A>=x A  R>done  A*  R*", "R saw x1, then used x0"),
    Scene("pending_read_late", _ONE, "A>=bell  R>pending  A*  R*", "R saw x1, then used x0"),
    Scene("bell_read_before_pending", _ONE, "A>=bell  R>pending  A*  R*", "R saw x1, then used x0"),
    Scene("pending_after_store", _ONE, "A>=x A  R>done  A*  R*", "R saw x1, then used x0"),
    Scene("pending_cleared_early", _ONE, "A>=bell  R>done  A*  R*", "R saw x1, then used x0"),
    Scene(
        "no_count_check",
        World(placer="asks", n_free=0, monotone=False),
        "A*  T>answered  R*  T*",
        "R may write what is traced",
    ),
    Scene(
        "no_recheck",
        World(placer="writes", n_free=0, monotone=False),
        "A*  R>=copy  T*  R*",
        "R may write what is traced",
    ),
    Scene(
        "no_entry_lock",
        World(n_consumers=2, shared=True),
        "A>=x  R>=copy  A*  S>=copy S  R>done  S*  R*",
        "S saw x1, then used x0",
        forbids="S is blocked at =lock[0x]",
    ),
    Scene("in_use_first", _FINAL, "R>bell  A>=base  R>done  A*  R*", "R keeps x0 for x1"),
    Scene("ring_early", _FINAL, "R>bell  A>=in_use  R>done  A*  R*", "R keeps x0 for x1"),
    Scene("left_unmarked", World(free_covers=""), "A*  R*", "R keeps x0 for x1"),
    Scene(
        "no_producer_fence",
        _TWICE,
        "A!>=x A! A!>=x A*  R!>done  a*  R!*",
        "R keeps x1 for x2",
        Model.TSO,
        forbids="A is blocked at fence",
    ),
    Scene(
        "no_consumer_fence",
        _TWICE,
        "A!>=x A! A!>=x  R>x R R>x R  A!*  R!*",
        "R keeps x1 for x2",
        Model.TSO,
        forbids="R is blocked at fence",
    ),
    Scene(
        "bell_plain_clear",
        _PAIR,
        "A!>=x A! A!>=pending A!  R>version  A!*  R!*",
        "R keeps y0 for y1",
        Model.TSO,
        right=Order.BELL_FLAG,
    ),
    Scene(
        "bell_cleared_late",
        _PAIR,
        "A>=x A A>=pending A  R>=bell  A*  R*",
        "R keeps y0 for y1",
        right=Order.BELL_FLAG,
    ),
    Scene(
        "no_channel_lock",
        World(stores=("x1", "y1"), capacity=2, n_free=0, monotone=False, channels=Channels.SHARED),
        "A>=in_use  B*  A*  R*",  # both have found the first slot free
        "R keeps x0 for x1",
        forbids="B is blocked at =lock{0}",
    ),
    Scene("relink_as_is", World(relinks=True), "A*  R*", "R saw x1, then used x0"),
)

SCENES: Final[Mapping[str, Scene]] = MappingProxyType({scene.switch: scene for scene in _ALL})
