"""Derived data kept coherent with primary data, in any trio or asyncio application.

    prices = Source("prices", {"apple": 3})

    @prices.view()
    async def label(sku: str) -> str:
        return f"{sku}: {prices[sku]}"

    async with Fabric(prices):
        await label("apple")          # derived, and kept
        label.peek("apple")           # at once, if it is kept
        version = prices.set("apple", 4)
        await prices.settled(version) # every worker has heard
        await label("apple")          # derived anew

An invalidation that arrives while a value is computed is never lost. Writers never wait; a worker
that cannot be told what changed drops all it has derived. It is the shadow-page problem without
page tables: sources are the guest's tables, views the shadows, workers the virtual CPUs.

Reading order: `errors`, `reading`, `source`, `view`, `fabric`, `checked`.

Source: A40 ¶57, 76, 126.
"""

from .checked import Checker as Checker
from .checked import checked as checked
from .errors import Circular as Circular
from .errors import CoherentError as CoherentError
from .errors import NotRunning as NotRunning
from .errors import NotSettled as NotSettled
from .errors import Overtaken as Overtaken
from .errors import StaleRead as StaleRead
from .fabric import Fabric as Fabric
from .fabric import Worker as Worker
from .reading import ABSENT as ABSENT
from .reading import Change as Change
from .source import Source as Source
from .view import Copy as Copy
from .view import CopyStatistics as CopyStatistics
from .view import View as View

__all__ = [
    "ABSENT",
    "Change",
    "Checker",
    "Circular",
    "CoherentError",
    "Copy",
    "CopyStatistics",
    "Fabric",
    "NotRunning",
    "NotSettled",
    "Overtaken",
    "Source",
    "StaleRead",
    "View",
    "Worker",
    "checked",
]
