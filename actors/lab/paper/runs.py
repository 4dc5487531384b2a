"""A run that a cell of the table rests on, as the command that makes it, and what it gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from penumbra.actors.lab.paper.calibration import NATIVE

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Run:
    """One run, no more than the command line can say.

    Attributes:
        workload: A listed name.
        scheme: A preset; it need not be built yet.
        profile: A shipped cost profile.
        settings: `TABLE.KEY=VALUE` each.
        flawed: The guest has a bug on purpose; an incoherent verdict is then a result.
    """

    workload: str
    scheme: str
    profile: str = NATIVE
    vcpus: int = 1
    settings: tuple[str, ...] = ()
    flawed: bool = False

    @property
    def all_settings(self) -> tuple[str, ...]:
        return (f"costs.profile={self.profile}", *self.settings)

    @property
    def words(self) -> list[str]:
        """Return the command's words behind the program's name."""
        words = ["run", self.workload, "--scheme", self.scheme, "--vcpus", str(self.vcpus)]
        for setting in self.all_settings:
            words += ["--set", setting]
        return words


@dataclass(frozen=True)
class Measured:
    """What a run gave.

    Attributes:
        summary: As in `summary.json`.
        coherent: The checker's verdict; None if nobody checked.
        events: Reads the columns of `events.npz`.
    """

    summary: Mapping[str, Any]
    coherent: bool | None = True
    events: Callable[[], Columns] = field(default=dict)

    def count(self, name: str) -> int:
        """Return a counter of the whole machine; 0 if nothing was counted."""
        return int(self.summary["counters"].get(name, 0))

    @property
    def elapsed(self) -> int:
        """Return the cycles until the last VCPU was done: of the VCPU that has cost most."""
        return max(int(vcpu["cost"]) for vcpu in self.summary["vcpu"])

    def problem(self, run: Run) -> str:
        """Say why no number may be taken from this run; empty if one may."""
        if self.summary["ended"] != "finished":
            return f"the run ended: {self.summary['ended']}"
        if run.flawed:
            return ""
        if self.coherent is False:
            return "the run is not coherent"
        if any(mark[0] == "wrong" for mark in self.summary["marks"]):
            return "the guest found wrong values"
        return ""


def same_page_share(columns: Columns, kinds: tuple[int, ...]) -> float:
    """Return which part of the emulated stores went to the page of the VCPU's last one before.

    Args:
        columns: `kind`, `vcpu`, and `arg0`: the guest-physical byte address stored to.
        kinds: The numbers of the events that are emulated stores.
    """
    chosen = np.isin(columns["kind"], kinds)
    vcpu, page = columns["vcpu"][chosen], columns["arg0"][chosen] >> 12
    if not len(page):
        return float("nan")
    hits = 0
    for one in np.unique(vcpu):
        own = page[vcpu == one]
        hits += int(np.count_nonzero(own[1:] == own[:-1]))
    return hits / len(page)
