"""What each scheme pays for what the guest does to its tables, and how that grows.

One guest, the same rounds for all (`scheme_guest`). Per scheme, against a raw trio ask:

hidden: the first load of a page that the guest maps. Without hidden faults (`nested`): a TLB miss.
store: to an entry that its own VCPU has derived: traced, logged, unsynchronised, or just a store.
event: a CR3 load after 16 such stores.
switch: a world leaves a CPU, another one sits down on it (`Host`).

Growth is the cost at one size against the cost at the smallest, divided by the factor by which its
definition makes it grow: 1 unless `DEMANDED` says otherwise, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from time import process_time

import anyio
import msgspec
import raw
from harness import Kind, Line, Row, Sampler, Side, pair, sides
from scheme_guest import SchemeRun, Size

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.host import Host
from penumbra.actors.machine.several import build_host
from penumbra.actors.vmm.schemes import PATCH, PRESETS, VTLB, Scheme
from penumbra.guest.workloads.workload import named_workload
from penumbra.hw.costs import CostProfile

SCHEMES = ("shootdown", "patch", "vtlb", "write-buffer", "out-of-sync", "nested")
EVENTS = {
    "hidden": "first load of a mapped page",
    "store": "store to an entry derived here",
    "event": "CR3 load after 16 such stores",
}
GROWS_AT_MOST = 1.3

# (scheme, event, what grows): why its cost may grow in proportion to that.
DEMANDED = {
    ("shootdown", "store", "told"): "every consumer told is asked to drop the entry (844, ¶91)",
    ("patch", "store", "told"): "one post per consumer told (836-842)",
    ("write-buffer", "event", "vcpus"): "an event reads every CPU's buffer (EG2)",
    ("write-buffer", "event", "told"): "whoever reads a log posts to each consumer told",
    ("vtlb", "event", "pages"): "an event drops all that has been filled (VTLB Fig. 10A)",
    ("out-of-sync", "event", "pages"): "an event compares whole tables (field notes 1.3)",
}


def cost(scheme: Scheme, event: str, size: Size) -> float:
    """Seconds per event of a machine's run."""
    if size.capacity:
        options = msgspec.structs.replace(scheme.options, capacity=size.capacity)
        scheme = msgspec.structs.replace(scheme, options=options)
    return SchemeRun(scheme, size).seconds[event]


def switch(scheme: Scheme, vcpus: int) -> float:
    """Seconds per world switch of two VMs that share as many CPUs as one has VCPUs."""
    config = MachineConfig(vcpus=vcpus, vms=2, cpus=vcpus, slice=400, quantum=200)
    workload = named_workload("process-switcher", processes=2, regions=2, turns=3)
    rig = build_host(config, scheme, workload, CostProfile(), 1, check=False)
    host = rig.run.__self__  # type: ignore[attr-defined]
    assert isinstance(host, Host)
    do, seconds, n = host._switch, 0.0, 0

    def timed(turn: object) -> None:
        nonlocal seconds, n
        start = process_time()
        do(turn)  # type: ignore[arg-type]
        seconds += process_time() - start
        n += 1

    host._switch = timed  # type: ignore[method-assign]
    anyio.run(rig.run, None, backend="trio")
    assert all(machine.ended == "finished" for machine in rig.machines)
    assert n > 20, n
    return seconds / n


# ---- growth --------------------------------------------------------------------------------------


@contextmanager
def grown(small: Side, large: Side, demanded: float) -> Iterator[Sampler]:
    yield pair(small, lambda: large() / demanded)


def growth(name: str, event: str, what: str, small: Size, large: Size) -> Row:
    """Return the row of one scheme's event at a large size against a small one."""
    scheme = PRESETS[name]
    base, top = getattr(small, what), getattr(large, what)
    demanded = top / base if (name, event, what) in DEMANDED else 1.0
    text = f"{name}, {EVENTS[event]}: {top} {what} ÷ {base}"
    if demanded != 1.0:
        text += f" ÷ {demanded:g}"
    opener = partial(
        grown, partial(cost, scheme, event, small), partial(cost, scheme, event, large), demanded
    )
    return Row(f"schemes/grown-{name}-{event}-{what}", text, Kind.TIME, GROWS_AT_MOST, opener)


def growths(name: str) -> Iterator[Row]:
    """Return all rows of a scheme's growth."""
    size = Size()
    for event in EVENTS:
        yield growth(name, event, "vcpus", size, replace(size, vcpus=16))
        yield growth(name, event, "pages", replace(size, pages=16), replace(size, pages=256))
        if PRESETS[name].propagate == "patch" and event != "hidden":
            few, many = replace(size, capacity=16), replace(size, capacity=4096)
            yield growth(name, event, "capacity", few, many)
    if name in ("shootdown", "patch", "write-buffer", "out-of-sync"):
        event = "event" if name == "write-buffer" else "store"
        all_derive = Size(vcpus=16, pages=16, told=16, rounds=1)
        yield growth(name, event, "told", replace(all_derive, told=1), all_derive)
    small, large = partial(switch, PRESETS[name], 2), partial(switch, PRESETS[name], 8)
    yield Row(
        f"schemes/grown-{name}-switch-vcpus", f"{name}, world switch: 8 vcpus ÷ 2", Kind.TIME,
        GROWS_AT_MOST, partial(grown, small, large, 1.0),
    )  # fmt: skip


# ---- the shadow cache ----------------------------------------------------------------------------


@cache
def switched_faults(scheme: Scheme) -> int:
    """Hidden faults of processes that are switched all the time: a count, the same on any host."""
    from penumbra.actors.machine.run import simulate

    workload = named_workload("process-switcher", regions=16, pages=4, turns=40)
    done = simulate(
        machine=MachineConfig(vcpus=1, timer_period=3_000), scheme=scheme, workload=workload,
        costs=CostProfile(), seed=1, check=False,
    )  # fmt: skip
    assert done.summary["ended"] == "finished", done.summary["ended"]
    return int(done.summary["counters"]["hidden_fault"])


@contextmanager
def counted() -> Iterator[Sampler]:
    yield lambda: (float(switched_faults(VTLB)), float(switched_faults(PATCH)))


def costs_of(name: str) -> Iterator[Line]:
    """Return a scheme's rows against a raw ask."""
    scheme = PRESETS[name]
    for event, what in EVENTS.items():
        text = f"{name}: {what} ÷ raw trio ask"
        side = partial(cost, scheme, event, Size())
        yield Row(f"schemes/{name}-{event}", text, Kind.TIME, None, sides(raw.ask, side))
    text = f"{name}: world switch ÷ raw trio ask"
    side = partial(switch, scheme, 2)
    yield Row(f"schemes/{name}-switch", text, Kind.TIME, None, sides(raw.ask, side))


LINES: tuple[Line, ...] = (
    Row("schemes/switcher-faults", "hidden faults of patch ÷ of vtlb, process-switcher (counts)",
        Kind.TIME, 0.1, counted, counts=True),
    *(line for name in SCHEMES for line in costs_of(name)),
    *(line for name in SCHEMES for line in growths(name)),
)  # fmt: skip
