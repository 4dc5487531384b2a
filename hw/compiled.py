"""The one boundary to numba: kernels by format, compiled when numba is there, plain otherwise.

`python -m penumbra.hw.compiled` compiles every kernel into numba's cache, so that a first run
starts warm.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from penumbra.hw.formats import FORMATS, FormatSpec

ENGINE_VARIABLE = "PENUMBRA_ENGINE"


@dataclass(frozen=True)
class Kernels:
    """One format's kernels; compiled ones want numpy arrays, plain ones memoryviews of them."""

    compiled: bool
    functions: Any


def engine_name() -> str:
    """Return `numba` or `plain`: the environment's wish, else what is installed.

    Raises:
        ValueError: PENUMBRA_ENGINE is neither, or is numba where numba is not installed.
    """
    wish = os.environ.get(ENGINE_VARIABLE, "")
    there = importlib.util.find_spec("numba") is not None
    if wish == "numba" and not there:
        raise ValueError(f"{ENGINE_VARIABLE}='numba', but numba is not installed (extra `fast`)")
    if wish not in ("", "numba", "plain"):
        raise ValueError(f"{ENGINE_VARIABLE}={wish!r}: expected 'numba' or 'plain'")
    return wish or ("numba" if there else "plain")


def _plain(function: Any) -> Any:
    return function


def _numba_jit(format_name: str) -> Callable[[Any], Any]:
    """Return numba's `njit` with a cache entry of its own for this format and these constants.

    Numba names a cache entry after file and qualified name and renews it when the file changes.
    One file serves several formats and freezes constants of others, so both go into the name.
    """
    import numba

    digest = hashlib.blake2b(digest_size=6)
    for source in ("kernels.py", "formats.py", "mmu_layout.py"):
        digest.update(Path(__file__).with_name(source).read_bytes())
    tag = f"{format_name}-{digest.hexdigest()}"
    njit = numba.njit(cache=True, nogil=True)

    def jit(function: Any) -> Any:
        function.__qualname__ = f"{tag}.{function.__name__}"
        return njit(function)

    return jit


@cache
def _kernels(name: str, engine: str) -> Kernels:
    jit: Callable[[Any], Any] = _plain
    if engine == "numba":
        jit = _numba_jit(name)
    # One module per format and engine; see the template's docstring.
    module_name = f"penumbra.hw.kernels_{name.replace('-', '_')}_{engine}"
    path = Path(__file__).with_name("kernels.py")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(SPEC=FORMATS[name], JIT=jit)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return Kernels(engine == "numba", module)


def kernels_for(spec: FormatSpec, engine: str | None = None) -> Kernels:
    """Return the kernels of `spec`, built once per process and engine."""
    return _kernels(spec.name, engine or engine_name())


def compile_all() -> None:
    """Compile each kernel of the formats that guests run on, by calling it on a tiny machine."""
    from penumbra.hw.cpu import warm_up

    for name in ("ia32", "pae", "x86-64"):
        warm_up(FORMATS[name])


if __name__ == "__main__":
    compile_all()
