"""One run: a configuration into a machine, and what the machine gives back into its folder."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import anyio
import msgspec

from penumbra.actors.console.config import RunConfig, Source
from penumbra.actors.console.errors import COMMAND_LINE, Interrupted, UsageError
from penumbra.actors.console.interrupts import deferred
from penumbra.actors.console.version import source_digest, version
from penumbra.actors.console.workloads import Chosen, build
from penumbra.actors.machine.build import ConfigurationError, plan_layout
from penumbra.actors.machine.run import RunResult, simulate
from penumbra.actors.observe import FolderError, Results, RunFolder, digest, toml_text
from penumbra.hw.compiled import ENGINE_VARIABLE, engine_name
from penumbra.hw.cpu import warm_up
from penumbra.hw.formats import FORMATS, PAGE_BYTES

COHERENT, INCOHERENT, UNCHECKED = "coherent", "INCOHERENT", "UNCHECKED"
_MOST_MIB = 16384


@dataclass(frozen=True)
class How:
    """How to run, which changes no result.

    Attributes:
        runs: The folder of run folders.
        engine: `numba` or `plain`; None lets the environment decide.
        loop: The event loop.
        check: Whether the oracle watches.
    """

    runs: Path
    engine: str | None = None
    loop: Literal["trio", "asyncio"] = "trio"
    check: bool = True


@dataclass(frozen=True)
class Job:
    """One scheme to run: what goes to a worker."""

    source: Source
    how: How


@dataclass(frozen=True)
class Outcome:
    """One finished run: what comes back from a worker.

    Attributes:
        folder: The run folder; its name is the run's id.
        repeats: The folder was complete before, and this run gave the same.
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

    @property
    def wrong(self) -> list[list[Any]]:
        """What the guest itself found wrong in its memory: marks as the summary has them."""
        return [mark for mark in self.summary["marks"] if mark[0] == "wrong"]

    @property
    def acceptable(self) -> bool:
        return self.verdict != INCOHERENT and not self.wrong

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
            "wall": self.wall,
        }


def execute(job: Job, on_progress: Callable[[float], None]) -> Outcome:
    """Run one scheme and leave its folder.

    Raises:
        UsageError: The configuration or the folder cannot be used.
        Interrupted: The folder is kept and marked PARTIAL.
    """
    config = job.source.decode()
    chosen = build(job.source, config)
    config = fit(job.source, config, chosen)
    _refuse_impossible(job.source, config, chosen)
    run_id = identify(config, chosen)
    with engine_chosen(job.how.engine), _folder_errors():
        with deferred():
            _load_lazy_parts(job.how.loop, config)
        text = config_text(config, chosen, job.how.runs / run_id)
        folder = RunFolder.begin(job.how.runs, run_id, text)
        result = _simulate(job, config, chosen, folder, on_progress)
        row = _wall_row(job.how, result)
        folder.finish(Results(result.summary, result.events.columns(), result.verdict, row))
    verdict = result.verdict
    return Outcome(
        scheme=config.scheme.name,
        workload=chosen.workload.name,
        folder=str(folder.path),
        repeats=folder.repeats,
        capacity=config.scheme.options.capacity,
        summary=result.summary,
        verdict=UNCHECKED if verdict is None else COHERENT if verdict.coherent else INCOHERENT,
        explanation=verdict.explain().splitlines() if verdict else [],
        checker=msgspec.to_builtins(verdict) if verdict else None,
        engine=result.engine,
        wall=result.wall,
    )


def _simulate(
    job: Job,
    config: RunConfig,
    chosen: Chosen,
    folder: RunFolder,
    on_progress: Callable[[float], None],
) -> RunResult:
    """Run the machine; if that does not end well, say in the folder why."""
    reached = 0.0

    def progress(fraction: float) -> None:
        nonlocal reached
        reached = fraction
        on_progress(fraction)

    try:
        return simulate(
            machine=config.machine,
            scheme=config.scheme,
            workload=chosen.workload,
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


def _refuse_impossible(source: Source, config: RunConfig, chosen: Chosen) -> None:
    """Raise if machine and workload do not go together."""
    try:
        layout = plan_layout(config.machine, chosen.workload)
    except ConfigurationError as error:
        raise UsageError(source.file, "$.machine", str(error).removeprefix("machine: ")) from None
    mib = layout.n_frames * PAGE_BYTES >> 20
    if mib > _MOST_MIB:
        cause = f"the workload needs {mib} MiB of guest RAM: at most {_MOST_MIB}"
        raise UsageError(source.file, "$.workload", cause)


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


def fit(source: Source, config: RunConfig, chosen: Chosen) -> RunConfig:
    """Let the machine take the recording's paging unless the user has said which."""
    machine = source.tables.get("machine", {})
    if chosen.workload.bits != 32 or "paging" in machine:
        return config
    fitting = msgspec.structs.replace(config.machine, paging="ia32")
    problem = fitting.problem()
    if problem:
        raise source.error("$.machine", problem)
    return msgspec.structs.replace(config, machine=fitting)


def identify(config: RunConfig, chosen: Chosen) -> str:
    """Return the run's id: the same exactly when results must be the same."""
    workload = chosen.workload
    determines = msgspec.to_builtins(config) | {
        "workload": [workload.name, workload.content_hash],
        "version": [version(), source_digest()],
    }
    del determines["scheme"]["about"]
    name = re.sub(r"[^\w.-]+", "-", workload.name).strip(".-") or "workload"
    return f"{name}-{digest(determines)}"


def config_text(config: RunConfig, chosen: Chosen, folder: Path) -> str:
    """Return `config.toml`: everything, defaults filled in; a trace's path counts from `folder`."""
    tables = msgspec.to_builtins(config)
    table = dict(chosen.table)
    if "trace" in table:
        table["trace"] = _relative(Path(table["trace"]), folder)
    tables["workload"] = table
    return f"# penumbra {version()}, sources {source_digest()}\n{toml_text(tables)}"


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return path.as_posix()


def _wall_row(how: How, result: RunResult) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "checked": how.check,
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
