"""The workloads by name."""

from __future__ import annotations

from collections.abc import Callable

from penumbra.guest.programs.program import Program
from penumbra.guest.workloads.buffer_pool import BufferPool
from penumbra.guest.workloads.compile_mix import CompileMix
from penumbra.guest.workloads.fork_storm import ForkStorm
from penumbra.guest.workloads.fork_wait import ForkWait
from penumbra.guest.workloads.mmap_churn import MmapChurn
from penumbra.guest.workloads.mmap_server import MmapServer
from penumbra.guest.workloads.munmap_storm import MunmapStorm
from penumbra.guest.workloads.page_fault import PageFault
from penumbra.guest.workloads.page_splitting import PageSplitting
from penumbra.guest.workloads.process_switcher import ProcessSwitcher
from penumbra.guest.workloads.pte_change import PteChange
from penumbra.guest.workloads.shootdown_stress import ShootdownStress
from penumbra.guest.workloads.swap_thrash import SwapThrash
from penumbra.guest.workloads.system_calls import SystemCalls

WORKLOADS: dict[str, tuple[str, Callable[..., Program]]] = {
    "buffer-pool": ("processes that share buffers over a larger store", BufferPool),
    "compile-mix": ("short compilers, forked, exec-ed, reading, computing", CompileMix),
    "fork-storm": ("a tree of processes writing copy-on-write pages", ForkStorm),
    "fork-wait": ("a process that forks and waits, over and over", ForkWait),
    "mmap-churn": ("processes that map, protect, move and unmap all the time", MmapChurn),
    "mmap-server": ("threads that map a file for each request", MmapServer),
    "munmap-storm": ("a thread that maps and unmaps among busy siblings", MunmapStorm),
    "page-fault": ("a process that only touches new pages", PageFault),
    "page-splitting": ("threads whose large pages are made and split meanwhile", PageSplitting),
    "process-switcher": ("many processes with many tables at one address", ProcessSwitcher),
    "pte-change": ("a process whose page-table entries keep changing", PteChange),
    "shootdown-stress": ("threads that use what a sibling keeps remapping", ShootdownStress),
    "swap-thrash": ("processes whose pages fit in memory a few at a time", SwapThrash),
    "system-calls": ("a process that calls the kernel for nothing", SystemCalls),
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
