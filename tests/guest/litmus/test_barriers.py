"""Orders of programs with barriers: which there are, and how many."""

from __future__ import annotations

from math import comb

import pytest

from penumbra.guest.litmus.barriers import Interleaving, Orders, Step, deadlock

Programs = tuple[tuple[Step, ...], ...]


def all_orders(programs: Programs) -> list[tuple[int, ...]]:
    """Go through every order, by brute force."""

    def after(done: tuple[int, ...]) -> list[tuple[int, ...]]:
        way = Interleaving(programs)
        for cpu in done:
            way.did(cpu)
            way.check()
        ready = way.ready()
        return [order for cpu in ready for order in after((*done, cpu))] if ready else [done]

    return after(())


@pytest.mark.parametrize(
    ("programs", "orders"),
    [
        (((None, None), (None,)), [(0, 0, 1), (0, 1, 0), (1, 0, 0)]),
        (((None, "x"), ("x", None)), [(0, 1)]),
        (((None, "x"), ("x", None), (None,)), [(0, 1, 2), (0, 2, 1), (2, 0, 1)]),
        ((("x", "y", None), ("x", None, "y")), [(1, 0)]),
        (((None, "x", None, "x"), ("x", None, "x", None)), [(0, 0, 1, 1), (0, 1, 0, 1)]),
        (((None, "x"), (None,)), [(0, 1), (1, 0)]),
        (((), ("x",)), [()]),
    ],
)
def test_orders_are_those_that_the_barriers_permit_each_once(
    programs: Programs, orders: list[tuple[int, ...]]
) -> None:
    assert sorted(all_orders(programs)) == orders
    assert Orders(programs).total == len(orders)


def test_orders_without_barriers_are_counted_as_the_binomials_say() -> None:
    assert Orders(((None,) * 6, (None,) * 5)).total == comb(11, 5)
    assert Orders(((None,) * 9,) * 16).total is None


def test_the_orders_after_each_choice_add_up_to_those_before() -> None:
    orders = Orders(((None, "x", None), ("x", None, None), (None, None)))
    way = Interleaving(((None, "x", None), ("x", None, None), (None, None)))
    while ready := way.ready():
        assert sum(orders.after(way.at, cpu) for cpu in ready) == orders.left(way.at)
        way.did(ready[-1])
    assert orders.left(way.at) == 1


def test_barriers_that_wait_for_each_other_are_named() -> None:
    assert deadlock((("x", "y"), ("y", "x"))) == ["x", "y"]
    assert deadlock((("x", "y"), ("x", "y"))) == []
