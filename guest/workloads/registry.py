"""The workloads by name."""

from __future__ import annotations

from collections.abc import Callable

from penumbra.guest.programs.program import Program
from penumbra.guest.workloads.buffer_pool import BufferPool
from penumbra.guest.workloads.fork_storm import ForkStorm
from penumbra.guest.workloads.mmap_churn import MmapChurn
from penumbra.guest.workloads.page_splitting import PageSplitting
from penumbra.guest.workloads.process_switcher import ProcessSwitcher
from penumbra.guest.workloads.shootdown_stress import ShootdownStress
from penumbra.guest.workloads.swap_thrash import SwapThrash

WORKLOADS: dict[str, tuple[str, Callable[..., Program]]] = {
    "buffer-pool": ("processes that share buffers over a larger store", BufferPool),
    "fork-storm": ("a tree of processes writing copy-on-write pages", ForkStorm),
    "mmap-churn": ("processes that map, protect, move and unmap all the time", MmapChurn),
    "page-splitting": ("threads whose large pages are made and split meanwhile", PageSplitting),
    "process-switcher": ("many processes with many tables at one address", ProcessSwitcher),
    "shootdown-stress": ("threads that use what a sibling keeps remapping", ShootdownStress),
    "swap-thrash": ("processes whose pages fit in memory a few at a time", SwapThrash),
}


def make_workload(name: str, **parameters: int) -> Program:
    """Return the workload `name` with the given parameters, defaults for the others.

    Raises:
        ValueError: There is no such workload, or it has no such parameter.
    """
    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r} (known: {', '.join(WORKLOADS)})")
    try:
        return WORKLOADS[name][1](**parameters)
    except TypeError as error:
        raise ValueError(f"workload {name!r}: {error}") from error
