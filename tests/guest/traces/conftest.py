"""Small synthetic lackey logs, one per process, and the import of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from penumbra.guest.traces import Recording, import_lackey

HEADER = """\
=={pid}== Lackey, an example Valgrind tool
=={pid}== Copyright (C) 2002-2017, and GNU GPL'd, by Nicholas Nethercote.
=={pid}== Using Valgrind-3.19.0 and LibVEX; rerun with -h for copyright info
=={pid}== Command: ./program
=={pid}== Parent PID: {parent}
=={pid}==
"""

ImportLogs = Callable[..., Recording]


@pytest.fixture
def import_logs(tmp_path: Path) -> ImportLogs:
    """Import logs given as {(pid, parent pid): body}; `@` in a body stands for `SYSCALL[pid,1]`."""

    def run(bodies: dict[tuple[int, int], str], provenance: str = "") -> Recording:
        paths = []
        for (pid, parent), body in bodies.items():
            path = tmp_path / f"log.{pid}"
            text = HEADER.format(pid=pid, parent=parent) + body.replace("@", f"SYSCALL[{pid},1]")
            path.write_text(text, newline="\n")
            paths.append(path)
        return import_lackey(paths, provenance=provenance)

    return run
