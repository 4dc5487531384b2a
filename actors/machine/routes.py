"""Who handles a physical interrupt or exception: a descriptor table per kind of world.

Switching worlds changes the table that is loaded, so what is interrupted decides. While a VM runs,
its monitor takes everything first: some it handles alone, some it hands to the kernel, which may
pass it on to the console or raise a virtual interrupt in a VM.

Source: A40 ¶54-55 (655).
"""

from __future__ import annotations

from enum import StrEnum


class Vector(StrEnum):
    """What can interrupt a physical CPU."""

    CHECK_ACTION = "check-action IPI"
    TIMER = "timer"
    DISK = "disk"
    KEYBOARD = "keyboard"
    PAGE_FAULT = "page fault"


class Route(StrEnum):
    """Who ends up handling it."""

    MONITOR = "monitor alone"
    KERNEL = "kernel"
    CONSOLE = "kernel to console"
    GUEST = "kernel to guest"


DescriptorTable = dict[Vector, Route]

DESCRIPTOR_TABLES: dict[str, DescriptorTable] = {
    "vm": {
        Vector.CHECK_ACTION: Route.MONITOR,
        Vector.TIMER: Route.KERNEL,
        Vector.DISK: Route.GUEST,
        Vector.KEYBOARD: Route.CONSOLE,
        Vector.PAGE_FAULT: Route.MONITOR,
    },
    "console": {
        Vector.CHECK_ACTION: Route.KERNEL,
        Vector.TIMER: Route.KERNEL,
        Vector.DISK: Route.GUEST,
        Vector.KEYBOARD: Route.CONSOLE,
        Vector.PAGE_FAULT: Route.CONSOLE,
    },
    "application": {
        Vector.CHECK_ACTION: Route.KERNEL,
        Vector.TIMER: Route.KERNEL,
        Vector.DISK: Route.GUEST,
        Vector.KEYBOARD: Route.CONSOLE,
        Vector.PAGE_FAULT: Route.KERNEL,
    },
}
"""By kind of world; a CPU without a world has the kernel's own, which is an application's."""


def route(kind: str | None, vector: Vector) -> Route:
    """Return who handles `vector` on a CPU that runs a world of this kind (None: no world)."""
    return DESCRIPTOR_TABLES[kind or "application"][vector]
