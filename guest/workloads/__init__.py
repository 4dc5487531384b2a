"""Workloads: guest programs written as coroutines, each of which checks what it reads.

A value that is wrong is reported by `Mark("wrong", (address, expected, found))`; a run without such
a mark and with every process ended by itself is a right one.
"""

from penumbra.guest.workloads.buffer_pool import BufferPool as BufferPool
from penumbra.guest.workloads.compile_mix import CompileMix as CompileMix
from penumbra.guest.workloads.fork_storm import ForkStorm as ForkStorm
from penumbra.guest.workloads.fork_wait import ForkWait as ForkWait
from penumbra.guest.workloads.mmap_churn import MmapChurn as MmapChurn
from penumbra.guest.workloads.mmap_server import MmapServer as MmapServer
from penumbra.guest.workloads.munmap_storm import MunmapStorm as MunmapStorm
from penumbra.guest.workloads.page_fault import PageFault as PageFault
from penumbra.guest.workloads.page_splitting import PageSplitting as PageSplitting
from penumbra.guest.workloads.process_switcher import ProcessSwitcher as ProcessSwitcher
from penumbra.guest.workloads.pte_change import PteChange as PteChange
from penumbra.guest.workloads.registry import WORKLOADS as WORKLOADS
from penumbra.guest.workloads.registry import make_workload as make_workload
from penumbra.guest.workloads.shootdown_stress import ShootdownStress as ShootdownStress
from penumbra.guest.workloads.swap_thrash import SwapThrash as SwapThrash
from penumbra.guest.workloads.system_calls import SystemCalls as SystemCalls

__all__ = [
    "WORKLOADS",
    "BufferPool",
    "CompileMix",
    "ForkStorm",
    "ForkWait",
    "MmapChurn",
    "MmapServer",
    "MunmapStorm",
    "PageFault",
    "PageSplitting",
    "ProcessSwitcher",
    "PteChange",
    "ShootdownStress",
    "SwapThrash",
    "SystemCalls",
    "make_workload",
]
