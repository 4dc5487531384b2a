"""A comparison that was killed goes on where it was; any executor takes its jobs; runs replay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penumbra.actors.console.compare import resume_all
from penumbra.actors.console.errors import UsageError
from penumbra.actors.console.execute import How, Job, Outcome
from penumbra.actors.console.workers import WorkerFailed, run_all
from penumbra.actors.console.workloads import find_source
from penumbra.actors.observe import canonical_json

Penumbra = Callable[..., tuple[int, str, str]]

TINY = ("--set", "workload.pages=3", "--set", "workload.children=1", "--set", "workload.depth=1")
TWO = ("--schemes", "shootdown,patch", "--jobs", "1")
COMPARE = ("compare", "fork-storm", *TINY, *TWO)


def job(scheme: str, runs: Path, rounds: int = 1) -> Job:
    source = find_source("fork-storm")
    for key, value in {"pages": 3, "children": 1, "depth": 1, "rounds": rounds}.items():
        source.set(f"workload.{key}", value, "--set")
    return Job(source.with_scheme(scheme, "--scheme"), How(runs, "plain"))


def reused(said: str) -> dict[str, bool]:
    return {one["scheme"]: one["reused"] for one in json.loads(said)["schemes"]}


def folder_of(said: str, scheme: str) -> Path:
    return next(
        Path(one["folder"]) for one in json.loads(said)["schemes"] if one["scheme"] == scheme
    )


def without_times(said: str) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(said)
    for one in whole["schemes"]:
        del one["wall"], one["reused"]
    return whole


@pytest.mark.shows("S3")
def test_what_is_complete_is_not_run_again_and_says_the_same(penumbra: Penumbra) -> None:
    first = penumbra(*COMPARE, "--json")[1]
    again = penumbra(*COMPARE, "--json")[1]
    assert reused(first) == {"shootdown": False, "patch": False}
    assert reused(again) == {"shootdown": True, "patch": True}
    assert without_times(again) == without_times(first)
    rows = json.loads((folder_of(again, "patch") / "wall.json").read_bytes())
    assert len(rows) == 1
    lines = penumbra(*COMPARE)[1].splitlines()
    assert "2 of 2 schemes were complete from before and not run again (--fresh runs all)" in lines
    fresh = penumbra(*COMPARE, "--fresh", "--json")[1]
    assert reused(fresh) == {"shootdown": False, "patch": False}
    assert without_times(fresh) == without_times(first)


@pytest.mark.parametrize(
    "damage", ["PARTIAL", "summary.json", "events.npz", "verdict.json", "config.toml", "wall.json"]
)
def test_a_folder_that_is_not_as_its_run_left_it_is_run_again(
    damage: str, penumbra: Penumbra
) -> None:
    folder = folder_of(penumbra(*COMPARE, "--json")[1], "patch")
    if damage == "PARTIAL":
        (folder / damage).write_text("unfinished\n")
    elif damage == "events.npz":
        data = (folder / damage).read_bytes()
        (folder / damage).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        (folder / damage).write_text("{}")
    code, out, err = penumbra(*COMPARE, "--json")
    if damage in ("PARTIAL", "config.toml", "wall.json"):
        assert (code, reused(out)) == (0, {"shootdown": True, "patch": False})
    else:  # run, and found to differ from what is there
        assert (code, out) == (2, "")
        assert f"differs in {damage} from this run" in err


def test_an_unchecked_run_does_not_stand_for_a_checked_one(penumbra: Penumbra) -> None:
    penumbra(*COMPARE, "--no-check")
    assert reused(penumbra(*COMPARE, "--json")[1]) == {"shootdown": False, "patch": False}
    assert reused(penumbra(*COMPARE, "--json")[1]) == {"shootdown": True, "patch": True}
    # Declined, the check is not smuggled in either.
    unchecked = json.loads(penumbra(*COMPARE, "--no-check", "--json")[1])
    assert {one["verdict"] for one in unchecked["schemes"]} == {"UNCHECKED"}
    assert {one["reused"] for one in unchecked["schemes"]} == {True}


def test_a_verdict_of_another_checker_does_not_stand(
    penumbra: Penumbra, monkeypatch: pytest.MonkeyPatch
) -> None:
    penumbra(*COMPARE)
    monkeypatch.setattr("penumbra.actors.console.resume.checker_digest", lambda: "another")
    assert reused(penumbra(*COMPARE, "--json")[1]) == {"shootdown": False, "patch": False}


def test_an_incoherent_run_is_remembered_as_one(penumbra: Penumbra) -> None:
    words = ("compare", "shootdown-stress", "--set", "workload.rounds=2", *TWO, "--json")
    broken = ("--set", "scheme.options.order=left_unmarked")
    first = penumbra(*words, *broken)
    again = penumbra(*words, *broken)
    assert first[0] == again[0] == 1
    assert reused(again[1])["patch"]
    assert without_times(again[1]) == without_times(first[1])


KILLED = """
import os, signal, sys
from pathlib import Path
from penumbra.actors.console.compare import resume_all
from penumbra.actors.console.progress import ProgressBars
sys.path.insert(0, {folder!r})
from test_resume import job

class Kills(ProgressBars):
    def reach(self, number, fraction):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

jobs = [job("native", Path("runs")), job("patch", Path("runs"), 60), job("shootdown", Path("runs"))]
resume_all(jobs, 1, Kills(["native", "patch", "shootdown"], quiet=True))
"""


@pytest.mark.shows("S3", "C4")
def test_a_comparison_that_was_killed_runs_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    killed = subprocess.run(
        [sys.executable, "-P", "-c", KILLED.format(folder=str(Path(__file__).parent))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PENUMBRA_ENGINE": "plain"},
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    runs = Path("runs")
    marks = sorted((folder / "PARTIAL").exists() for folder in runs.iterdir())
    assert marks == [False, True]
    jobs = [job("native", runs), job("patch", runs, 60), job("shootdown", runs)]
    outcomes = resume_all(jobs, 1)
    assert [outcome.reused for outcome in outcomes] == [True, False, False]
    assert {outcome.verdict for outcome in outcomes} == {"coherent"}
    assert not any((folder / "PARTIAL").exists() for folder in runs.iterdir())
    fresh = run_all([jobs[1].__class__(jobs[1].source, How(tmp_path / "other", "plain"))], 1)
    assert fresh[0].summary == outcomes[1].summary


def facts(outcomes: list[Outcome]) -> list[tuple[str, str, dict[str, Any], str]]:
    return [(one.scheme, one.id, one.summary, one.verdict) for one in outcomes]


class Inline(Executor):
    """An executor that does all at once, where it is asked."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.shows("S3")
def test_any_executor_gives_what_this_process_gives(tmp_path: Path) -> None:
    schemes = ("native", "shootdown", "patch")
    here = facts(run_all([job(name, tmp_path / "here") for name in schemes], 1))
    executors: list[Executor] = [
        Inline(),
        ThreadPoolExecutor(2),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")),
    ]
    for number, executor in enumerate(executors):
        with executor:
            jobs = [job(name, tmp_path / str(number)) for name in schemes]
            assert facts(run_all(jobs, executor=executor)) == here


def test_what_goes_wrong_in_an_executor_is_heard(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match="Not a directory"):
        run_all([job("native", tmp_path / "runs")], executor=Inline())

    class Broken(Executor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(RuntimeError("no such machine"))
            return future

    with pytest.raises(WorkerFailed, match="no such machine"):
        run_all([job("native", tmp_path / "x")], executor=Broken())


@pytest.mark.shows("C4")
@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_a_run_replays_from_its_token_byte_for_byte(loop: str, penumbra: Penumbra) -> None:
    said = json.loads(penumbra("run", "fork-storm", *TINY, "--seed", "9", "--json")[1])
    words = ("replay", said["id"], "--loop", loop)
    code, out, err = penumbra(*words)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"replayed {said['folder']}",
        "summary.json  the same bytes",
        "events.npz    the same bytes",
        "verdict.json  the same bytes",
    ]
    by_path = json.loads(penumbra("replay", said["folder"], "--json")[1])
    assert (by_path["equal"], by_path["same_sources"], by_path["id"]) == (True, True, said["id"])
    # Nothing of it is left, and the run's own times are as they were.
    assert [path.name for path in Path("runs").iterdir()] == [said["id"]]
    assert len(json.loads((Path(said["folder"]) / "wall.json").read_bytes())) == 1


@pytest.mark.shows("C4")
def test_a_replay_that_gives_something_else_says_what(penumbra: Penumbra) -> None:
    said = json.loads(penumbra("run", "fork-storm", *TINY, "--json")[1])
    folder = Path(said["folder"])
    summary = json.loads((folder / "summary.json").read_bytes())
    (folder / "summary.json").write_text(json.dumps(summary | {"cost": 1}))
    config = (folder / "config.toml").read_text()
    code, out, _ = penumbra("replay", str(folder))
    assert code == 1
    assert f"summary.json  DIFFERENT; first: cost was 1, is {summary['cost']}" in out
    # Another seed is another run: its token is not the folder's name any more.
    (folder / "summary.json").write_bytes(canonical_json(summary))
    assert penumbra("replay", str(folder))[0] == 0
    (folder / "config.toml").write_text(config.replace("seed = 0", "seed = 77"))
    code, out, _ = penumbra("replay", str(folder), "--json")
    other = json.loads(out)
    assert (code, other["equal"], other["same_sources"]) == (1, False, False)
    assert not other["files"]["summary.json"]


def test_the_first_event_that_differs_is_named(penumbra: Penumbra) -> None:
    said = json.loads(penumbra("run", "fork-storm", *TINY, "--json")[1])
    path = Path(said["folder"]) / "events.npz"
    with np.load(path) as stored:
        columns = {name: stored[name].copy() for name in stored.files}
    columns["gva"][6] += 1
    was, now = int(columns["gva"][6]), int(columns["gva"][6]) - 1
    np.savez(path, **columns)
    code, out, _ = penumbra("replay", said["id"])
    assert code == 1
    assert f"events.npz    DIFFERENT; first: event 7: gva was {was}, is {now}" in out
    np.savez(path, **{name: column[:5] for name, column in columns.items()})
    n = len(columns["seq"])
    assert f"first: 5 events, now {n}" in penumbra("replay", said["id"])[1]


def test_what_cannot_be_replayed_is_refused_in_one_line(penumbra: Penumbra) -> None:
    penumbra("run", "fork-storm", *TINY)
    [folder] = Path("runs").iterdir()
    Path("empty").mkdir()
    (folder / "PARTIAL").write_text("unfinished\n")
    cases = {
        ("nothing",): "command line: nothing: neither a folder nor a token of a run in runs",
        ("empty",): "empty: config.toml: is missing: no run folder",
        (str(folder),): f"{folder}: PARTIAL: the run has not finished: nothing to compare",
        (str(folder), "--seed", "1"): "command line: --seed 1: a replay takes the seed of the run",
    }
    for words, said in cases.items():
        assert penumbra("replay", *words) == (2, "", f"penumbra: {said}\n")
    (folder / "PARTIAL").unlink()
    (folder / "config.toml").write_text('[workload]\nname = "fork-storm"\n')
    code, out, err = penumbra("replay", str(folder))
    assert (code, out, err.count("\n")) == (2, "", 1)
