"""One run: a configuration into a machine, and what the machine gives back into its folder."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import msgspec

from penumbra.actors.check import Verdict
from penumbra.actors.console.config import RunConfig
from penumbra.actors.console.errors import COMMAND_LINE, Interrupted, UsageError
from penumbra.actors.console.interrupts import deferred
from penumbra.actors.console.prepare import How as How
from penumbra.actors.console.prepare import Job as Job
from penumbra.actors.console.prepare import Prepared, prepare
from penumbra.actors.console.version import checker_digest, version
from penumbra.actors.machine.run import RunResult, simulate
from penumbra.actors.observe import FolderError, Results, RunFolder
from penumbra.hw.compiled import ENGINE_VARIABLE, engine_name
from penumbra.hw.cpu import warm_up
from penumbra.hw.formats import FORMATS

COHERENT, INCOHERENT, UNCHECKED = "coherent", "INCOHERENT", "UNCHECKED"


@dataclass(frozen=True)
class Outcome:
    """One finished run: what comes back from a worker.

    Attributes:
        folder: The run folder; its name is the run's id.
        repeats: The folder was complete before, and this run gave the same.
        reused: Nothing was run: all this was in the folder.
        capacity: Patches per channel.
        verdict: `coherent`, `INCOHERENT` or `UNCHECKED`.
        explanation: The checker's text, one entry per line.
        checker: The verdict's values; None when unchecked.
    """

    scheme: str
    workload: str
    folder: str
    repeats: bool
    capacity: int
    summary: dict[str, Any]
    verdict: str
    explanation: list[str] = field(repr=False)
    checker: dict[str, Any] | None = field(repr=False)
    engine: str
    wall: dict[str, float]
    reused: bool = False

    @property
    def wrong(self) -> list[list[Any]]:
        """What the guest itself found wrong in its memory: marks as the summary has them."""
        return [mark for mark in self.summary["marks"] if mark[0] == "wrong"]

    @property
    def n_hazards(self) -> int:
        """Accesses or runs by translations that the guest's OS had revoked: its own mistakes."""
        return int(self.checker["n_hazards"]) if self.checker else 0

    @property
    def acceptable(self) -> bool:
        return self.verdict != INCOHERENT and not self.wrong

    def passes(self, hazards: str) -> bool:
        """Tell whether this is no failure, hazards being one if that is `fail`."""
        return self.acceptable and not (hazards == "fail" and self.n_hazards)

    @property
    def id(self) -> str:
        return Path(self.folder).name

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints of a run."""
        return {
            "scheme": self.scheme,
            "id": self.id,
            "folder": self.folder,
            "verdict": self.verdict,
            "checker": self.checker,
            "summary": self.summary,
            "engine": self.engine,
            "reused": self.reused,
            "wall": self.wall,
        }


def execute(job: Job, on_progress: Callable[[float], None]) -> Outcome:
    """Run one scheme and leave its folder.

    Raises:
        UsageError: The configuration or the folder cannot be used.
        Interrupted: The folder is kept and marked PARTIAL.
    """
    ready = prepare(job)
    config, chosen = ready.config, ready.chosen
    with engine_chosen(job.how.engine), _folder_errors():
        with deferred():
            _load_lazy_parts(job.how.loop, config)
        folder = RunFolder.begin(job.how.runs, ready.folder.name, ready.text)
        result = _simulate(ready, folder, on_progress)
        row = _wall_row(job.how, result)
        folder.finish(Results(result.summary, result.events.columns(), result.verdict, row))
    return Outcome(
        scheme=config.scheme.name,
        workload=chosen.workload.name,
        folder=str(folder.path),
        repeats=folder.repeats,
        capacity=config.scheme.options.capacity,
        summary=result.summary,
        engine=result.engine,
        wall=result.wall,
        **judgement(result.verdict),
    )


def judgement(verdict: Verdict | None) -> dict[str, Any]:
    """Return what an outcome says of a verdict."""
    return {
        "verdict": UNCHECKED if verdict is None else COHERENT if verdict.coherent else INCOHERENT,
        "explanation": verdict.explain().splitlines() if verdict else [],
        "checker": msgspec.to_builtins(verdict) if verdict else None,
    }


def _simulate(
    ready: Prepared, folder: RunFolder, on_progress: Callable[[float], None]
) -> RunResult:
    """Run the machine; if that does not end well, say in the folder why."""
    job, config = ready.job, ready.config
    reached = 0.0

    def progress(fraction: float) -> None:
        nonlocal reached
        reached = fraction
        on_progress(fraction)

    try:
        return simulate(
            machine=config.machine,
            scheme=config.scheme,
            workload=ready.chosen.workload,
            costs=config.costs,
            seed=config.seed,
            check=job.how.check,
            loop=job.how.loop,
            on_progress=progress,
        )
    except MemoryError:
        folder.discard()
        cause = "this machine has not the memory that the guest's would take"
        raise UsageError(job.source.file, "$.machine", cause) from None
    except BaseException as error:
        where = f" at {reached:.0%} of the references" if reached else ""
        if _is_interrupt(error):
            folder.cut(f"interrupted{where}")
            raise Interrupted([] if folder.repeats else [str(folder.path)]) from None
        folder.cut(f"failed{where}: {error!r}")
        raise


def _load_lazy_parts(loop: str, config: RunConfig) -> None:
    """Let everything be imported and compiled that would be on first use."""
    anyio.run(anyio.sleep, 0, backend=loop)
    if engine_name() == "numba":
        warm_up(FORMATS[config.machine.paging])


def _is_interrupt(error: BaseException) -> bool:
    """Tell whether Ctrl-C ended the loop, however many task groups it has come through."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(KeyboardInterrupt) is not None
    return isinstance(error, KeyboardInterrupt)


def _wall_row(how: How, result: RunResult) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "checked": how.check,
        "checker": checker_digest() if how.check else None,
        "engine": result.engine,
        "loop": how.loop,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "seconds": result.wall,
        "version": version(),
    }


@contextmanager
def engine_chosen(name: str | None) -> Iterator[None]:
    """Let the CPUs be executed by this engine meanwhile."""
    if name == "numba" and importlib.util.find_spec("numba") is None:
        raise UsageError(COMMAND_LINE, "--engine numba", "numba is not installed (extra: fast)")
    before = os.environ.get(ENGINE_VARIABLE)
    if before not in (None, "", "numba", "plain") and name is None:
        raise UsageError("environment", ENGINE_VARIABLE, f"{before!r} is neither numba nor plain")
    if name is not None:
        os.environ[ENGINE_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ENGINE_VARIABLE, None)
        else:
            os.environ[ENGINE_VARIABLE] = before


@contextmanager
def _folder_errors() -> Iterator[None]:
    try:
        yield
    except FolderError as error:
        raise UsageError(str(error.path), "run folder", error.cause) from None
