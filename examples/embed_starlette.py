"""A Starlette application with derived views under load, and a virtual machine in the same loop.

    python -P examples/embed_starlette.py [--requests N]

Prices are primary data; pages and a basket's total are derived from them and kept. PUT changes a
price and waits until every view has heard; GET answers from what is kept. The machine runs as a
task of the application's lifespan, and its state is served by a view of its own. Requests go
through the ASGI interface in this process, so no port is opened. Runs on asyncio; trio is not
imported.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from penumbra.actors.coherent import Change, Fabric, Source
from penumbra.actors.machine.build import build_machine
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.workload import named_workload
from penumbra.hw.costs import CostProfile

SKUS = [f"sku-{number}" for number in range(20)]


async def run_guest(state: Source[str, str]) -> None:
    """Run a small guest to its end and say how it went."""
    machine, oracle = build_machine(
        MachineConfig(vcpus=2),
        PRESETS["patch"],
        named_workload("fork-storm", depth=1, pages=4, rounds=1),
        CostProfile(),
        seed=1,
    )
    ended = await machine.run(lambda: None)
    assert oracle is not None
    state.set("machine", f"{ended}, {'coherent' if oracle.verdict().coherent else 'STALE'}")


def make_app() -> Starlette:
    """Make an application with data of its own: two of them may run in one process."""
    prices = Source("prices", dict.fromkeys(SKUS, 100))
    state = Source("state", {"machine": "running"})

    @prices.view(limit=1000)
    async def page(sku: str) -> dict[str, object]:
        await asyncio.sleep(0)  # as if a template were rendered elsewhere
        return {"sku": sku, "cents": prices[sku], "rank": sorted(prices, key=price_of).index(sku)}

    def price_of(sku: str) -> int:
        return prices[sku]

    def add(total: int, change: Change) -> int:
        result: int = total + change.new - change.old
        return result

    @prices.view(apply=add)
    async def total(_: None) -> int:
        return sum(prices[sku] for sku in prices)

    @state.view()
    async def status(_: None) -> dict[str, object]:
        return {"machine": state["machine"], "total": await total(None)}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with Fabric(prices, state), asyncio.TaskGroup() as tasks:
            tasks.create_task(run_guest(state))
            yield

    async def get(request: Request) -> Response:
        sku = request.path_params["sku"]
        if sku not in prices:
            return JSONResponse({"unknown": sku}, 404)
        return JSONResponse(page.peek(sku) or await page(sku))

    async def put(request: Request) -> Response:
        version = prices.set(request.path_params["sku"], int(await request.json()))
        await prices.settled(version, within=1)
        return Response(headers={"x-version": str(version)})

    async def show_status(request: Request) -> Response:
        if "wait" in request.query_params:  # until the guest has ended
            await status.at_least(1, within=60)
        return JSONResponse(await status(None))

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/prices/{sku}", get),
            Route("/prices/{sku}", put, methods=["PUT"]),
            Route("/status", show_status),
        ],
    )


async def put_load(client: httpx.AsyncClient, n: int, last: dict[str, int]) -> None:
    """Change prices, each at once visible to whoever asks next."""
    draw = random.Random(1)
    for _ in range(n):
        sku, cents = draw.choice(SKUS), draw.randrange(50, 200)
        answer = await client.put(f"/prices/{sku}", json=cents)
        assert answer.is_success
        last[sku] = cents
        found = (await client.get(f"/prices/{sku}")).json()["cents"]
        assert found == cents, (sku, found, cents)


async def get_load(client: httpx.AsyncClient, n: int) -> None:
    draw = random.Random(2)
    for _ in range(n):
        answer = await client.get(f"/prices/{draw.choice(SKUS)}")
        assert answer.is_success


async def main(n_requests: int) -> None:
    app = make_app()
    last = dict.fromkeys(SKUS, 100)
    # httpx leaves the lifespan to us; a server would enter it.
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client,
    ):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(put_load(client, n_requests // 8, last))
            for _ in range(4):
                tasks.create_task(get_load(client, n_requests // 8))
        status = (await client.get("/status?wait=1")).json()
        assert status["total"] == sum(last.values())
    print(f"asyncio: {n_requests // 8} changes under load, each seen by whoever asked next")
    print(f"asyncio: guest in the same loop: {status['machine']}")
    assert "trio" not in sys.modules


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=800, metavar="N")
    asyncio.run(main(parser.parse_args().requests))
