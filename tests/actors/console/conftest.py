"""The command as a function: arguments in; exit code, stdout and stderr out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from penumbra.actors.console.main import main


class Said(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def penumbra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Run the command in an empty folder, on the plain engine: these guests are tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PENUMBRA_ENGINE", "plain")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(*words: str) -> Said:
        capsys.readouterr()
        code = main(words)
        printed = capsys.readouterr()
        return Said(code, printed.out, printed.err)

    return run
