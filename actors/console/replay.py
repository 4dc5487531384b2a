"""`penumbra replay`: a run again, from what its folder says it was; and whether it gives the same.

A run's token is its id: the name of its folder, which is a hash of configuration, seed, workload
and sources. Replayed is what `config.toml` says, in a folder of its own that is then thrown away;
summary and events must be the same bytes, and so must the verdict, if there is one.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penumbra.actors.console.config import Source, read_toml
from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.console.execute import How, Job, execute
from penumbra.actors.console.prepare import prepare
from penumbra.actors.console.printing import print_json
from penumbra.actors.console.progress import ProgressBars
from penumbra.actors.console.tables import Paper
from penumbra.actors.observe import COLUMNS

_SAME, _OTHER = "the same bytes", "DIFFERENT"


@dataclass(frozen=True)
class Replayed:
    """What a replay has given.

    Attributes:
        id: The run's token now; it differs from the folder's name where sources have changed.
        files: By name, whether each has the same bytes.
        first: By name of a file that differs, where it first does.
    """

    folder: Path
    id: str
    files: dict[str, bool]
    first: dict[str, str]

    @property
    def equal(self) -> bool:
        return all(self.files.values())

    @property
    def same_sources(self) -> bool:
        return self.id == self.folder.name


def replay(arguments: argparse.Namespace) -> int:
    """Run again, print, and return the exit code: 1 if anything differs."""
    if arguments.seed is not None:
        cause = "a replay takes the seed of the run"
        raise UsageError(COMMAND_LINE, f"--seed {arguments.seed}", cause)
    folder = find_folder(arguments.what, Path(arguments.runs))
    with ProgressBars([folder.name], arguments.quiet) as bars:
        bars.start(0)
        done = replay_folder(folder, arguments.engine, arguments.loop, bars)
        bars.end(0, "done")
    code = 0 if done.equal else 1
    if arguments.json:
        print_json(_as_json(done, code))
    elif arguments.quiet:
        print(f"{folder.name}: {_SAME if done.equal else _OTHER}")
    else:
        _print(done)
    return code


def find_folder(word: str, runs: Path) -> Path:
    """Return the run folder that a path or a token means.

    Raises:
        UsageError: There is none, or its run has not finished.
    """
    folder = next((path for path in (Path(word), runs / word) if path.is_dir()), None)
    if folder is None:
        raise UsageError(COMMAND_LINE, word, f"neither a folder nor a token of a run in {runs}")
    if (folder / "PARTIAL").exists():
        raise UsageError(str(folder), "PARTIAL", "the run has not finished: nothing to compare")
    for name in ("config.toml", "summary.json", "events.npz"):
        if not (folder / name).is_file():
            raise UsageError(str(folder), name, "is missing: no run folder")
    return folder


def replay_folder(
    folder: Path, engine: str | None, loop: Any, bars: ProgressBars | None = None
) -> Replayed:
    """Run what a folder says it holds, once more, and compare.

    Raises:
        UsageError: Its configuration or its workload cannot be used any more.
    """
    compared = ["summary.json", "events.npz"]
    if (folder / "verdict.json").is_file():
        compared.append("verdict.json")
    with tempfile.TemporaryDirectory(prefix="penumbra-replay-") as place:
        how = How(Path(place), engine, loop, check="verdict.json" in compared)
        job = Job(_source(folder), how)
        run_id = prepare(job).folder.name
        again = Path(execute(job, lambda done: bars.reach(0, done) if bars else None).folder)
        files = {name: filecmp.cmp(folder / name, again / name, shallow=False) for name in compared}
        first = {
            name: _first_difference(folder / name, again / name)
            for name, same in files.items()
            if not same
        }
    return Replayed(folder, run_id, files, first)


def _source(folder: Path) -> Source:
    source = read_toml(folder / "config.toml")
    # As configured, whatever today's preset of that name is.
    scheme = source.tables.get("scheme")
    if not isinstance(scheme, dict) or "name" not in scheme:
        raise UsageError(source.file, "$.scheme", "a run folder names its scheme")
    return source


def _first_difference(before: Path, after: Path) -> str:
    try:
        return _first_event(before, after) if before.suffix == ".npz" else _first_key(before, after)
    except (OSError, ValueError, LookupError) as error:
        return f"cannot be read: {error}"


def _first_event(before: Path, after: Path) -> str:
    with np.load(before, allow_pickle=False) as old, np.load(after, allow_pickle=False) as new:
        n = min(len(old["seq"]), len(new["seq"]))
        rows = [
            (int(np.argmax(old[c][:n] != new[c][:n])), c)
            for c in COLUMNS
            if _differ(old, new, c, n)
        ]
        if rows:
            row, column = min(rows)
            return f"event {row + 1}: {column} was {old[column][row]}, is {new[column][row]}"
        return f"{len(old['seq'])} events, now {len(new['seq'])}"


def _differ(old: Any, new: Any, column: str, n: int) -> bool:
    return bool((old[column][:n] != new[column][:n]).any())


def _first_key(before: Path, after: Path) -> str:
    old, new = json.loads(before.read_bytes()), json.loads(after.read_bytes())
    if not isinstance(old, dict):
        return "is no table"
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            return f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}"
    return "the same values, written differently"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _as_json(done: Replayed, code: int) -> dict[str, Any]:
    return {
        "command": "replay",
        "exit_code": code,
        "folder": str(done.folder),
        "id": done.id,
        "same_sources": done.same_sources,
        "equal": done.equal,
        "files": done.files,
        "first": done.first,
    }


def _print(done: Replayed) -> None:
    paper = Paper()
    paper.line(f"replayed {done.folder}", "bold")
    if not done.same_sources:
        paper.line(f"its token would now be {done.id}: the sources are others", "yellow")
    width = max(map(len, done.files))
    for name, same in done.files.items():
        what = _SAME if same else f"{_OTHER}; first: {done.first[name]}"
        paper.line(f"{name:{width}}  {what}", "green" if same else "bold red")
