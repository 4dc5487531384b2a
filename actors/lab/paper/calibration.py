"""Unit costs out of three published nanobenchmarks (R1-R3), by elimination.

A nanobenchmark is a row of counters (what the machine counts when it does that once) and a
published number of cycles. The equations are solved in order; each may hold one price that is not
known yet.
What no equation can tell is *assumed* and says so: it is not calibrated, and neither is anything
that rests on it.

The nanobenchmarks, with what they are made of here:

divzero  a fault that has nothing to do with memory, delivered to a handler that returns: one
         `guest_fault`
pgfault  the same for a page that is not present: before it, one cold walk; under a monitor the
         fault exits first, and the monitor finds that it is the guest's own
ptemod   a store to a page-table entry in use, on a traced page: it exits (hardware-assisted) or is
         a call-out (translated code), is emulated, and the entry derived from it is dropped

Source: K. Adams, O. Agesen, A Comparison of Software and Hardware Techniques for x86
Virtualization, ASPLOS 2006, nanobenchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from penumbra.hw.costs import CostProfile, prices

NATIVE, HARDWARE, TRANSLATED = "native-2006", "hw-vmm-2006", "bt-vmm-2006"
WALK_READS = 4  # a cold walk of the four-level format reads as many entries


class CalibrationError(ValueError):
    """The equations have no solution in whole cycles >= 0, or not exactly one unknown each."""


@dataclass(frozen=True)
class Equation:
    """One published nanobenchmark.

    Attributes:
        row: Its id among the published ratios.
        cycles: As published.
        counters: What the machine counts when it does that once.
    """

    row: str
    cycles: int
    counters: Mapping[str, int]


PUBLISHED: dict[str, dict[str, int]] = {
    "divzero": {NATIVE: 889, TRANSLATED: 3223, HARDWARE: 1014},
    "pgfault": {NATIVE: 1093, TRANSLATED: 3927, HARDWARE: 11242},
    "ptemod": {TRANSLATED: 391, HARDWARE: 12733},
}
"""Cycles by nanobenchmark and system; native ptemod is one store, whose price is progress."""

_FAULT = {"guest_fault": 1}
_PAGE_FAULT = {"guest_fault": 1, "walk_read": WALK_READS}
_STORE = {"emulated_store": 1, "shootdown": 1, "invlpg": 1}
_MADE_OF: dict[tuple[str, str], dict[str, int]] = {
    ("divzero", NATIVE): _FAULT,
    ("divzero", TRANSLATED): _FAULT,
    ("divzero", HARDWARE): _FAULT,
    ("pgfault", NATIVE): _PAGE_FAULT,
    ("pgfault", TRANSLATED): {**_PAGE_FAULT, "exit": 1},
    ("pgfault", HARDWARE): {**_PAGE_FAULT, "exit": 1},
    ("ptemod", TRANSLATED): {**_STORE, "callout": 1},
    ("ptemod", HARDWARE): {**_STORE, "exit": 1},
}
_ROWS = {"pgfault": "R1", "ptemod": "R2", "divzero": "R3"}

ASSUMED: dict[str, int] = {
    "tlb_miss": 0,  # a miss is its walk
    "hidden_fault": 0,  # the exit of R1 holds the monitor's own walk of the guest's tables
    "shootdown": 0,  # R2 holds the change of one derived entry; a remote one is an `ipi` beside it
}
"""Prices that no equation tells apart from those it finds: none for what those hold already."""


def equations(system: str) -> list[Equation]:
    """Return a system's nanobenchmarks in the order in which they can be solved."""
    return [
        Equation(_ROWS[name], PUBLISHED[name][system], _MADE_OF[name, system])
        for name in ("divzero", "pgfault", "ptemod")
        if system in PUBLISHED[name]
    ]


def solve(known: Mapping[str, int], rows: Sequence[Equation]) -> dict[str, int]:
    """Return the prices that the equations add to the known ones, in cycles.

    Raises:
        CalibrationError: Naming the row that has not exactly one unknown, or no whole price >= 0.
    """
    found: dict[str, int] = {}
    for row in rows:
        priced = {**known, **found}
        unknown = [name for name in row.counters if name not in priced]
        if len(unknown) != 1:
            raise CalibrationError(f"{row.row}: {len(unknown)} unknown prices: {unknown}")
        rest = row.cycles - sum(n * priced.get(name, 0) for name, n in row.counters.items())
        price, remainder = divmod(rest, row.counters[unknown[0]])
        if remainder or price < 0:
            raise CalibrationError(f"{row.row}: {unknown[0]} would be {rest} cycles")
        found[unknown[0]] = price
    return found


def calibrate() -> dict[str, tuple[CostProfile, tuple[str, ...]]]:
    """Return, by system, its profile and the names of the prices that R1-R3 have set."""
    native = solve(ASSUMED, equations(NATIVE))
    done = {NATIVE: _profile(NATIVE, native)}
    default = prices(CostProfile())
    for system in (TRANSLATED, HARDWARE):
        # The walk is the hardware's; what else is known is assumed, the default's.
        known = {name: default[name] for name in ("callout", "invlpg")}
        known |= ASSUMED | {"walk_read": native["walk_read"]}
        found = solve(known, equations(system))
        done[system] = _profile(system, {"walk_read": native["walk_read"], **found})
    return done


def _profile(system: str, found: Mapping[str, int]) -> tuple[CostProfile, tuple[str, ...]]:
    """Return a whole profile: an interrupt is delivered as a fault is, the rest is the default."""
    source = (
        f"{system}: calibrated on R1-R3 (Adams and Agesen, ASPLOS 2006, nanobenchmarks"
        f" divzero, pgfault, ptemod): {', '.join(sorted(found))}; all else assumed"
    )
    table = {"source": source, **ASSUMED, "interrupt": found["guest_fault"], **found}
    return msgspec.convert(table, CostProfile), tuple(sorted(found))


def profile_text(system: str) -> str:
    """Return the TOML of a system's profile, each price marked; the default's are left out."""
    profile, calibrated = calibrate()[system]
    default = prices(CostProfile())
    lines = [
        "# Cycles of the machine that R1-R3 were measured on: docs/costs.md. This file is what",
        "# lab/paper/calibration.py derives. `calibrated`: R1-R3 say so; `assumed`: they do not.",
        f'source = "{profile.source}"',
    ]
    for name, price in prices(profile).items():
        if name in calibrated or price != default[name]:
            tag = "calibrated" if name in calibrated else "assumed"
            lines.append(f"{f'{name} = {price}':<24}# {tag}")
    return "\n".join(lines) + "\n"
