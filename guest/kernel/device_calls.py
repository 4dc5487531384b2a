"""The kernel's driver of the device window: its mappings and its interrupts.

A program maps the window as it maps a file (`DEVICE_FILE`, one page, shared); the page behind it is
no frame of RAM, so it is never counted, cleared, copied or paged out. An interrupt of the window is
counted, and its end is told through the window itself.
"""

from __future__ import annotations

from collections import Counter

from penumbra.guest.kernel.areas import MAP_SHARED
from penumbra.guest.kernel.process import Thread
from penumbra.hw.device_window import END, window_base
from penumbra.hw.formats import PAGE_SHIFT, FormatSpec
from penumbra.hw.operations import StorePhysical

DEVICE_FILE = (1 << 40) - 1


def refuses(file_id: int, n_pages: int, offset: int, flags: int) -> bool:
    """Tell whether a mapping of the window is asked for that it cannot have."""
    return file_id == DEVICE_FILE and (n_pages != 1 or offset != 0 or not flags & MAP_SHARED)


class DeviceDriver:
    """Serves the window's interrupts.

    Attributes:
        gfn: The guest frame that is the window.
        served: How many interrupts were served, by vector.
    """

    def __init__(self, spec: FormatSpec) -> None:
        self._base = window_base(spec)
        self.gfn = self._base >> PAGE_SHIFT
        self.served: Counter[int] = Counter()

    async def serve(self, vector: int) -> None:
        """Count an interrupt and let the next one come. Interrupts are disabled."""
        self.served[vector] += 1
        await StorePhysical(self._base + END, 4, 0)

    async def device_interrupts(self, thread: Thread, args: tuple[int, ...]) -> int:
        """(vector) -> how many interrupts with it have been served so far, on all CPUs."""
        return self.served[args[0]]
