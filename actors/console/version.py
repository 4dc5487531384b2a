"""The version of what is installed, and of the very sources that run."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from pathlib import Path

_FOLDERS = ("hw", "guest", "actors/core", "actors/vmm", "actors/runtime", "actors/machine")


def version() -> str:
    """Return the distribution's version, `0` when the tree is used without installing it."""
    try:
        return distribution_version("penumbra-vm")
    except PackageNotFoundError:
        return "0"


@cache
def source_digest() -> str:
    """Return hex digits that change with any source that can change a result.

    A version number says too little in a working tree: results of one day would be held against
    those of the day before. Checker, observers and console change no result and are left out.
    """
    return _digest(_FOLDERS)


@cache
def checker_digest() -> str:
    """Return hex digits that change with any source of the checker, which decides verdicts."""
    return _digest(("actors/check",))


def _digest(folders: tuple[str, ...]) -> str:
    top = Path(__file__).resolve().parent.parent.parent
    digest = hashlib.blake2b(digest_size=4)
    for folder in folders:
        for path in sorted((top / folder).rglob("*.py")):
            digest.update(path.relative_to(top).as_posix().encode() + b"\0")
            digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()
