"""Several runs, each in a process of its own.

Not an executor: Ctrl-C must reach every run exactly once. A worker leaves the terminal's process
group, so that the key press reaches only us, and we pass it on; SIGINT is blocked in it except
while it runs, so that none is lost and none comes in between.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from penumbra.actors.console import interrupts
from penumbra.actors.console.errors import Interrupted, UsageError
from penumbra.actors.console.execute import Job, Outcome, execute
from penumbra.actors.console.progress import ProgressBars

_REDRAW_SECONDS = 0.1


@dataclass(frozen=True)
class _Stopped:
    """Ctrl-C ended the run; its PARTIAL folder, if it left one."""

    folders: list[str]


@dataclass(frozen=True)
class _Refused:
    file: str
    place: str
    cause: str


@dataclass(frozen=True)
class _Failed:
    traceback: str


class WorkerFailed(Exception):
    """A run ended by a bug or was killed; the text says where."""


def run_all(jobs: Sequence[Job], n_workers: int, bars: ProgressBars) -> list[Outcome]:
    """Run jobs, at most `n_workers` at a time, and return their outcomes in order.

    Raises:
        UsageError: A job was refused; the others have been interrupted.
        Interrupted: Naming every folder left PARTIAL.
        WorkerFailed: A job ended by a bug; the others have been interrupted.
    """
    if n_workers == 1 or len(jobs) == 1:
        return [_in_process(number, job, bars) for number, job in enumerate(jobs)]
    crew = _Crew(jobs, bars)
    try:
        return crew.work(n_workers)
    except KeyboardInterrupt:
        raise Interrupted(crew.stop()) from None
    except BaseException:
        crew.stop()
        raise


def _in_process(number: int, job: Job, bars: ProgressBars) -> Outcome:
    bars.start(number)
    outcome = execute(job, lambda fraction: bars.reach(number, fraction))
    bars.end(number, outcome.verdict)
    return outcome


class _Crew:
    """The workers at work.

    Invariant: a job is waiting, running or has its outcome.
    """

    def __init__(self, jobs: Sequence[Job], bars: ProgressBars) -> None:
        self._jobs = jobs
        self._bars = bars
        self._running: dict[Connection, tuple[int, BaseProcess]] = {}
        self._outcomes: dict[int, Outcome] = {}

    def work(self, n_workers: int) -> list[Outcome]:
        waiting = list(enumerate(self._jobs))
        while waiting or self._running:
            while waiting and len(self._running) < n_workers:
                self._start(*waiting.pop(0))
            for ready in wait(list(self._running), _REDRAW_SECONDS):
                assert isinstance(ready, Connection)
                self._take(ready)
            self._bars.refresh()
        return [self._outcomes[number] for number in range(len(self._jobs))]

    def stop(self) -> list[str]:
        """Interrupt what runs, wait until it has ended, and return the folders left PARTIAL."""
        folders = []
        try:
            for _, process in self._running.values():
                _interrupt(process)
            for connection in self._running:
                folders += _last_words(connection)
        finally:
            for _, process in self._running.values():
                process.terminate()
                process.join()
        return folders

    def _start(self, number: int, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, theirs), daemon=True)
        if interrupts.CAN_DEFER:
            resource_tracker.ensure_running()  # else it is started below, and admits SIGINT
        with interrupts.deferred():
            process.start()
        theirs.close()
        self._running[ours] = number, process
        self._bars.start(number)

    def _take(self, connection: Connection) -> None:
        number, process = self._running[connection]
        try:
            message = connection.recv()
        except EOFError:
            del self._running[connection]
            process.join()
            raise WorkerFailed(f"a worker ended without a word: {process.exitcode}") from None
        if isinstance(message, float):
            self._bars.reach(number, message)
            return
        del self._running[connection]
        process.join()
        match message:
            case Outcome():
                self._outcomes[number] = message
                self._bars.end(number, message.verdict)
            case _Refused():
                raise UsageError(message.file, message.place, message.cause)
            case _Stopped():
                raise Interrupted(message.folders)
            case _Failed():
                raise WorkerFailed(message.traceback)


def _work(job: Job, connection: Connection) -> None:
    """Be a worker: run one job and say what became of it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    message: Outcome | _Stopped | _Refused | _Failed
    try:
        with interrupts.admitted():
            message = execute(job, connection.send)
    except UsageError as error:
        message = _Refused(error.file, error.place, error.cause)
    except Interrupted as interrupt:
        message = _Stopped(interrupt.folders)
    except KeyboardInterrupt:
        message = _Stopped([])
    except Exception:
        message = _Failed(traceback.format_exc())
    connection.send(message)


def _last_words(connection: Connection) -> list[str]:
    """Return the folders that an interrupted worker names last."""
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return []
        if isinstance(message, _Stopped):
            return message.folders


def _interrupt(process: BaseProcess) -> None:
    if interrupts.CAN_DEFER and process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGINT)
    else:
        process.terminate()
