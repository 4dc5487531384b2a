"""A trio pipeline whose workers keep derived data, beside a virtual machine in the same loop.

    python -P examples/embed_trio.py [--orders N]

Prices are primary data; each of three workers keeps quotes derived from them. A ticker changes
prices while the workers price orders; an order that names the version it was made under is never
priced by an older one. Two further fabrics and a machine run beside it, all in one trio loop.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

import trio

from penumbra.actors.coherent import Change, Copy, Fabric, Source, checked
from penumbra.actors.machine.build import build_machine
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.workload import named_workload
from penumbra.hw.costs import CostProfile

N_WORKERS = 3
SKUS = [f"sku-{number}" for number in range(20)]


@dataclass(frozen=True)
class Order:
    """What somebody wants, and the version of the prices they have seen."""

    sku: str
    amount: int
    version: int


class Shop:
    """Prices with two views: a quote per article, and the sum of all prices, kept by patching."""

    def __init__(self) -> None:
        self.prices = prices = Source("prices", dict.fromkeys(SKUS, 100))

        @prices.view(limit=16)
        async def quote(sku: str) -> int:
            await trio.lowlevel.checkpoint()  # a derivation may wait; changes may come meanwhile
            return prices[sku] * 119 // 100

        def add(total: int, change: Change) -> int:
            return int(total + change.new - change.old)

        @prices.view(apply=add)
        async def total(_: None) -> int:
            return sum(prices[sku] for sku in prices)

        self.quote = quote
        self.total = total


async def change_prices(shop: Shop, done: trio.Event, seed: int) -> None:
    draw = random.Random(seed)
    while not done.is_set():
        shop.prices.set(draw.choice(SKUS), draw.randrange(50, 200))
        await trio.lowlevel.checkpoint()


async def price_orders(
    quote: Copy[str, int],
    orders: trio.MemoryReceiveChannel[Order],
    priced: trio.MemorySendChannel[int],
) -> None:
    async with orders, priced:
        async for order in orders:
            await quote.at_least(order.version, within=5)
            cents = await quote(order.sku)
            await priced.send(cents * order.amount)


async def make_orders(shop: Shop, n: int, orders: trio.MemorySendChannel[Order]) -> None:
    draw = random.Random(7)
    async with orders:
        for _ in range(n):
            await orders.send(Order(draw.choice(SKUS), draw.randrange(1, 9), shop.prices.version))


async def run_shop(shop: Shop, n_orders: int, seed: int) -> list[int]:
    """Price some orders while prices change; every worker has heard of all changes at the end."""
    results: list[int] = []
    fabric = Fabric(shop.prices, workers=N_WORKERS, capacity=8)
    async with fabric, checked(fabric):  # checked: each quote is compared with the prices
        async with trio.open_nursery() as nursery:
            done = trio.Event()
            send_order, orders = trio.open_memory_channel[Order](4)
            send_priced, priced = trio.open_memory_channel[int](4)
            nursery.start_soon(change_prices, shop, done, seed)
            nursery.start_soon(make_orders, shop, n_orders, send_order)
            async with orders, send_priced:
                for worker in fabric.workers:
                    quote = shop.quote.at(worker)
                    nursery.start_soon(price_orders, quote, orders.clone(), send_priced.clone())
            async with priced:
                async for result in priced:
                    results.append(result)
            done.set()
        await shop.prices.settled(shop.prices.version, within=5)
        for worker in fabric.workers:
            assert await shop.total.at(worker)(None) == sum(shop.prices[sku] for sku in SKUS)
    return results


async def run_guest(seen: Source[str, int]) -> str:
    """Run a small guest to its end; how often the loop got its turn is primary data, too."""
    machine, oracle = build_machine(
        MachineConfig(vcpus=2),
        PRESETS["patch"],
        named_workload("fork-storm", depth=1, pages=4, rounds=1),
        CostProfile(),
        seed=1,
    )

    def count() -> None:
        seen.set("turns", seen.get("turns", 0) + 1)

    ended = await machine.run(count)
    assert oracle is not None
    return f"{ended}, {'coherent' if oracle.verdict().coherent else 'STALE'}"


async def main(n_orders: int) -> None:
    shops = [Shop(), Shop()]
    machine_seen = Source[str, int]("machine")
    priced: list[int] = []
    ends: list[str] = []

    async def shop_task(shop: Shop, seed: int) -> None:
        priced.append(len(await run_shop(shop, n_orders, seed)))

    async def guest_task() -> None:
        async with Fabric(machine_seen, name="machine"):
            ends.append(await run_guest(machine_seen))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest_task)
        for seed, shop in enumerate(shops):
            nursery.start_soon(shop_task, shop, seed)
    assert all(shop.prices.version for shop in shops)
    print(f"trio: {sum(priced)} orders priced by {2 * N_WORKERS} workers, while prices changed")
    print(f"trio: guest in the same loop: {ends[0]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--orders", type=int, default=500, metavar="N")
    trio.run(main, parser.parse_args().orders)
