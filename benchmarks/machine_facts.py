"""What a result was measured on: processor, versions, load; nothing that names the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "anyio", "trio", "msgspec", "numpy", "numba", "uvloop", "thespian", "pycachesim",
)  # fmt: skip


def load() -> float:
    """Return the load average of the last minute, -1 where there is none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0


def machine_facts() -> dict[str, Any]:
    """Return the facts that belong beside every figure."""
    return {
        "processor": _processor(),
        "processors": os.cpu_count() or 1,
        "processors_usable": _usable(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _usable() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
