"""What goes to stdout as it is, and the command's own name in advice."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any


def print_json(value: Any) -> None:
    """Print a value as canonical JSON."""
    from penumbra.actors.observe import canonical_json

    sys.stdout.write(canonical_json(value).decode())


def program() -> str:
    """Return how to call this command from here: as it was called, where a bare name won't do."""
    called = Path(sys.argv[0])
    if called.name != "penumbra" or shutil.which("penumbra"):
        return "penumbra"
    here = os.path.relpath(called)
    return str(called) if here.startswith("..") else here
