"""Ctrl-C: the run is cancelled, its folder stays and says PARTIAL, nothing else is said."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Literal

import pytest

from penumbra.actors.console.errors import Interrupted
from penumbra.actors.console.execute import How, Job, execute
from penumbra.actors.console.progress import ProgressBars
from penumbra.actors.console.workers import run_all
from penumbra.actors.console.workloads import find_source


class PressesCtrlC(ProgressBars):
    """Bars that send SIGINT to this process once the first report comes."""

    def __init__(self) -> None:
        super().__init__([], quiet=True)
        self.pressed = False

    def reach(self, number: int, fraction: float) -> None:
        if not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)


def job(
    runs: Path, scheme: str = "patch", rounds: int = 200, loop: Literal["trio", "asyncio"] = "trio"
) -> Job:
    source = find_source("fork-storm")
    source.set("workload.rounds", rounds, "--set")
    return Job(source.with_scheme(scheme, "--scheme"), How(runs, "plain", loop))


def contents(runs: Path) -> list[tuple[list[str], str]]:
    return [
        (sorted(path.name for path in folder.iterdir()), (folder / "PARTIAL").read_text())
        for folder in sorted(runs.iterdir())
    ]


PARTIAL = (["PARTIAL", "config.toml"], "interrupted\n")


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_an_interrupted_run_leaves_a_folder_marked_partial(
    loop: Literal["trio", "asyncio"], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted) as raised:
        run_all([job(tmp_path, loop=loop)], 1, PressesCtrlC())
    assert raised.value.folders == [str(path) for path in tmp_path.iterdir()]
    assert contents(tmp_path) == [PARTIAL]


def test_every_worker_is_interrupted_and_each_folder_is_named(tmp_path: Path) -> None:
    jobs = [job(tmp_path, scheme) for scheme in ("native", "patch", "shootdown")]
    with pytest.raises(Interrupted) as raised:
        run_all(jobs, 2, PressesCtrlC())
    # The third never started; of the others one may not have come as far as its folder, or have
    # finished before the key was pressed: a complete folder is not named.
    partial = [path for path in sorted(tmp_path.iterdir()) if (path / "PARTIAL").exists()]
    assert sorted(raised.value.folders) == [str(path) for path in partial]
    assert {tuple(sorted(child.name for child in path.iterdir())) for path in partial} <= {
        ("PARTIAL", "config.toml")
    }


def test_an_interrupted_run_is_finished_by_running_it_again(tmp_path: Path) -> None:
    # Rounds enough to last until the first report.
    short = job(tmp_path, rounds=2)
    with pytest.raises(Interrupted):
        run_all([short], 1, PressesCtrlC())
    assert contents(tmp_path) == [PARTIAL]
    outcome = execute(short, lambda _: None)
    assert (outcome.verdict, outcome.repeats) == ("coherent", False)
    assert not (Path(outcome.folder) / "PARTIAL").exists()
