"""What a command costs before it does anything: processor time of whole processes.

The yardstick of `--help` is `python -P -c pass`. The run is a warm one, of the shipped recording,
with numba's cache filled; it ends itself behind the first piece of references executed.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from harness import Kind, Line, Row, Sampler, Side, pair

from penumbra import guest

_MAIN = "from penumbra.actors.console.main import main; raise SystemExit(main())"
# The first piece of a block that has been executed ends the process, as nothing else would.
_FIRST = """
import os, sys
from penumbra.hw import cpu
def first(self, work, user, at, block=cpu.PhysicalCpu._block):
    stop = block(self, work, user, at)
    if self.reg[16]:  # R_REFERENCES
        os._exit(77)
    return stop
cpu.PhysicalCpu._block = first
"""
_ENDED = 77
# A warm start finds bytecode; where it is never written each start compiles every module.
_ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
}


def seconds(arguments: list[str], expected: int = 0) -> float:
    """Return the processor seconds of one Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-P", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        check=False, env=_ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == expected, done.stderr.decode(errors="replace")[-400:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def program(code: str, *words: str) -> list[str]:
    return ["-c", f"import sys; sys.argv = ['penumbra', *sys.argv[1:]]\n{code}", *words]


def bare() -> float:
    return seconds(["-c", "pass"])


def helps() -> float:
    return seconds(program(_MAIN, "--help"))


@contextmanager
def opened(side: Side, yardstick: Side) -> Iterator[Sampler]:
    side()  # bytecode, numba's cache, the page cache
    yield pair(yardstick, side)


@contextmanager
def first_reference() -> Iterator[Sampler]:
    """Processor seconds until the first piece of the recording has been executed, ÷ one second."""
    recording = Path(guest.__path__[0]) / "recordings" / "pipeline.trace"
    with tempfile.TemporaryDirectory() as folder:
        words = program(_FIRST + _MAIN, "run", str(recording), "--quiet", "--runs", folder)
        with opened(lambda: seconds(words, _ENDED), lambda: 1.0) as sampler:
            yield sampler


LINES: tuple[Line, ...] = (
    Row("start/help", "`--help` ÷ bare Python start", Kind.TIME, 5.0, partial(opened, helps, bare)),
    Row("start/first-reference", "warm `run` to the first reference, processor seconds",
        Kind.TIME, 2.0, first_reference),
)  # fmt: skip
