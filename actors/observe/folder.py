"""The run folder: what a run leaves behind, never half-written and never written over.

    runs/<id>/config.toml    everything that determines the run, defaults filled in
              summary.json   what was counted          } no verdict, no engine, no times:
              events.npz     what happened, as columns } the same bytes from the same id
              verdict.json   what the checker says; absent when there was none
              wall.json      a row per run of this id: times, engine, versions, hash of the rest
              PARTIAL        there while the run is unfinished, or was cut

A second run of a complete folder is compared with it. Equal, it adds its row to `wall.json` (and
the verdict, if the first run was unchecked); different, it is kept beside it and both are named.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penumbra.actors.observe.events import Columns
from penumbra.actors.observe.summary import canonical_json, write_npz

CONFIG, SUMMARY, EVENTS = "config.toml", "summary.json", "events.npz"
VERDICT, WALL, PARTIAL = "verdict.json", "wall.json", "PARTIAL"

_RESULTS = (SUMMARY, EVENTS)
_FILES = (*_RESULTS, VERDICT, WALL, CONFIG)


class FolderError(Exception):
    """The folder cannot take this run.

    Attributes:
        path: The folder.
        cause: Why, in one line.
    """

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.path, self.cause = path, cause


class FolderDiffers(FolderError):
    """The same id has given another result; the new one stands in `other`."""

    def __init__(self, path: Path, other: Path, files: list[str]) -> None:
        super().__init__(path, f"differs in {', '.join(files)} from this run, kept in {other}")
        self.other, self.files = other, files


@dataclass(frozen=True)
class Results:
    """What a finished run leaves.

    Attributes:
        summary: JSON-able and deterministic.
        events: As `EventLog.columns` gives them.
        verdict: JSON-able or a msgspec Struct; None when nothing was checked.
        wall: One row of `wall.json`.
    """

    summary: Mapping[str, Any]
    events: Columns
    verdict: Any
    wall: Mapping[str, Any]


class RunFolder:
    """One folder of one id, from `begin` to `finish` or `cut`.

    Invariant: a folder without PARTIAL is complete; a complete one only ever gains.
    """

    def __init__(self, path: Path, config: str, fresh: bool) -> None:
        self.path = path
        self._config = config
        self._fresh = fresh

    @classmethod
    def begin(cls, root: Path, run_id: str, config: str) -> RunFolder:
        """Make `root/run_id` and mark it PARTIAL; leave it alone if it is complete.

        Raises:
            FolderError: It is neither complete nor PARTIAL, or cannot be made; it is as before.
        """
        path = root / run_id
        try:
            if path.exists() and not (path / PARTIAL).exists():
                missing = [name for name in (CONFIG, *_RESULTS) if not (path / name).is_file()]
                if not missing:
                    return cls(path, config, fresh=False)
                if any(path.iterdir()):
                    raise FolderError(path, f"is no run folder: it lacks {', '.join(missing)}")
            _start(path, config)
        except OSError as error:
            raise FolderError(path, error.strerror or str(error)) from None
        return cls(path, config, fresh=True)

    @property
    def repeats(self) -> bool:
        """Whether a complete run of the same id was there already."""
        return not self._fresh

    def cut(self, why: str) -> None:
        """Say in PARTIAL why the run has not finished; a complete folder is left alone."""
        if self._fresh:
            _write(self.path / PARTIAL, f"{why}\n".encode())

    def discard(self) -> None:
        """Remove the folder of a run that could not begin; a complete one is left alone."""
        if self._fresh:
            for name in (*_FILES, PARTIAL):
                (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # something else stands in it
                self.path.rmdir()

    def finish(self, results: Results) -> None:
        """Write the results, or compare them with those that are there.

        Raises:
            FolderDiffers: Both are kept.
            FolderError: Nothing could be written; PARTIAL stays.
        """
        try:
            # Another run of the same id may have completed the folder meanwhile.
            if self._fresh and (self.path / PARTIAL).exists():
                _complete(self.path, results)
            else:
                self._compare(results)
        except OSError as error:
            raise FolderError(self.path, error.strerror or str(error)) from None

    def _compare(self, results: Results) -> None:
        again = _unused(self.path, "again")
        _start(again, self._config)
        _complete(again, results)
        names = [*_RESULTS]
        if (self.path / VERDICT).exists() and (again / VERDICT).exists():
            names.append(VERDICT)
        different = [
            name for name in names if not filecmp.cmp(self.path / name, again / name, shallow=False)
        ]
        if different:
            other = _unused(self.path, "differs")
            again.rename(other)
            raise FolderDiffers(self.path, other, different)
        if (again / VERDICT).exists() and not (self.path / VERDICT).exists():
            (again / VERDICT).replace(self.path / VERDICT)
        shutil.rmtree(again)
        _add_row(self.path, results.wall)


def is_whole(path: Path, config: str) -> bool:
    """Tell whether a folder holds, complete, what the last run of this very configuration left.

    Complete are the files; that they are the ones written then says the hash beside their times.
    """
    try:
        if (path / PARTIAL).exists() or (path / CONFIG).read_bytes() != config.encode():
            return False
        rows = json.loads((path / WALL).read_bytes())
        return bool(rows[-1]["content"] == _content(path))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _content(path: Path) -> str:
    """Return the hash of all that a run has left but `wall.json`."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, *_RESULTS, VERDICT):
        if name != VERDICT or (path / name).exists():
            data = (path / name).read_bytes()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _start(path: Path, config: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    _write(path / PARTIAL, b"unfinished\n")
    for name in _FILES:
        (path / name).unlink(missing_ok=True)
    _write(path / CONFIG, config.encode())


def _complete(path: Path, results: Results) -> None:
    _write(path / SUMMARY, canonical_json(results.summary))
    whole = path / f".{EVENTS}"
    write_npz(whole, results.events)
    whole.replace(path / EVENTS)
    if results.verdict is not None:
        _write(path / VERDICT, canonical_json(results.verdict))
    _add_row(path, results.wall)
    (path / PARTIAL).unlink()


def _add_row(path: Path, row: Mapping[str, Any]) -> None:
    try:
        rows = json.loads((path / WALL).read_bytes())
    except (FileNotFoundError, ValueError):
        rows = []
    _write(path / WALL, canonical_json([*rows, {**row, "content": _content(path)}]))


def _write(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    new = path.with_name(f".{path.name}")
    new.write_bytes(content)
    new.replace(path)


def _unused(path: Path, word: str) -> Path:
    """Name a folder beside `path` that does not exist."""
    number = os.getpid() if word == "again" else 1
    while (other := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return other


def read_columns(folder: Path) -> Columns:
    """Return the event columns that a run left in its folder."""
    with np.load(folder / EVENTS, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
