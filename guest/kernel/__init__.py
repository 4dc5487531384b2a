"""The guest's operating system. Start reading at `kernel.py`."""

from penumbra.guest.kernel.areas import page_word as page_word
from penumbra.guest.kernel.boot import BootMemory as BootMemory
from penumbra.guest.kernel.boot import BootState as BootState
from penumbra.guest.kernel.boot import StartRegisters as StartRegisters
from penumbra.guest.kernel.bugs import GUEST_BUGS as GUEST_BUGS
from penumbra.guest.kernel.kernel import Kernel as Kernel
from penumbra.guest.kernel.kernel import KernelOptions as KernelOptions
from penumbra.guest.kernel.layout import Layout as Layout
from penumbra.guest.kernel.layout import LayoutError as LayoutError
from penumbra.guest.kernel.layout import default_layout as default_layout
from penumbra.guest.kernel.process import Process as Process
from penumbra.guest.kernel.process import Thread as Thread
from penumbra.guest.kernel.vectors import VECTOR_DISK as VECTOR_DISK
from penumbra.guest.kernel.vectors import VECTOR_RESCHEDULE as VECTOR_RESCHEDULE
from penumbra.guest.kernel.vectors import VECTOR_SHOOTDOWN as VECTOR_SHOOTDOWN
from penumbra.guest.kernel.vectors import VECTOR_STOP as VECTOR_STOP
from penumbra.guest.kernel.vectors import VECTOR_TIMER as VECTOR_TIMER

__all__ = [
    "GUEST_BUGS",
    "VECTOR_DISK",
    "VECTOR_RESCHEDULE",
    "VECTOR_SHOOTDOWN",
    "VECTOR_STOP",
    "VECTOR_TIMER",
    "BootMemory",
    "BootState",
    "Kernel",
    "KernelOptions",
    "Layout",
    "LayoutError",
    "Process",
    "StartRegisters",
    "Thread",
    "default_layout",
    "page_word",
]
