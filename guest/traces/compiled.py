"""This package's one boundary to numba: the log scanner, compiled when numba is there.

`PENUMBRA_ENGINE=plain` keeps it out here as it does for the CPUs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

from penumbra.guest.traces import scan as scan_module
from penumbra.hw.compiled import engine_name

Scan = Callable[..., None]


@cache
def compiled_scan() -> Scan:
    """Return the compiled scanner; compiled once per change of its file, then from numba's cache.

    Raises:
        ImportError: There is no numba.
    """
    import numba

    compiled: Scan = numba.njit(cache=True, nogil=True)(scan_module.scan)
    return compiled


def scan_for(n_bytes: int, worth_bytes: int) -> Scan | None:
    """Return the scanner for a text of `n_bytes`, or None where numpy does as well.

    Loading numba costs what numpy takes for some megabytes, so a short text alone is not worth it.

    Raises:
        ValueError: PENUMBRA_ENGINE names no engine.
    """
    if engine_name() != "numba" or importlib.util.find_spec("numba") is None:
        return None
    if n_bytes < worth_bytes and not compiled_scan.cache_info().currsize:
        return None
    return compiled_scan()
