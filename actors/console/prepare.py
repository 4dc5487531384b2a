"""What is to be run: a configuration and a workload that go together, and the id of their run."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from penumbra.actors.console.config import RunConfig, Source
from penumbra.actors.console.errors import UsageError
from penumbra.actors.console.version import source_digest, version
from penumbra.actors.console.workloads import Chosen, build
from penumbra.actors.machine.build import ConfigurationError, plan_layout
from penumbra.actors.observe import digest, toml_text
from penumbra.hw.formats import PAGE_BYTES

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
class Prepared:
    """A job whose configuration and workload go together.

    Attributes:
        folder: Where its run folder is to be; the name is the run's id.
        text: Its `config.toml`.
    """

    job: Job
    config: RunConfig
    chosen: Chosen
    folder: Path
    text: str


def prepare(job: Job) -> Prepared:
    """Decode a job and build its workload.

    Raises:
        UsageError: The configuration cannot be used.
    """
    config = job.source.decode()
    chosen = build(job.source, config)
    config = fit(job.source, config, chosen)
    _refuse_impossible(job.source, config, chosen)
    folder = job.how.runs / identify(config, chosen)
    return Prepared(job, config, chosen, folder, config_text(config, chosen, folder))


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
