"""The embedding examples run to their end, as the recipe runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.shows("K5", "P11")
@pytest.mark.parametrize(
    ("script", "options", "first", "second"),
    [
        (
            "embed_starlette.py",
            ["--requests", "160"],
            "asyncio: 20 changes under load, each seen by whoever asked next",
            "asyncio: guest in the same loop: finished, coherent",
        ),
        (
            "embed_trio.py",
            ["--orders", "60"],
            "trio: 120 orders priced by 6 workers, while prices changed",
            "trio: guest in the same loop: finished, coherent",
        ),
    ],
)
def test_an_embedding_example_runs_as_it_says(
    script: str, options: list[str], first: str, second: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-P", f"examples/{script}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{first}\n{second}\n", "")
