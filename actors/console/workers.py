"""Several runs, each in a process of its own, or wherever somebody's executor takes them.

Our own workers are no executor: Ctrl-C must reach every run exactly once. A worker leaves the
terminal's process group, so that the key press reaches only us, and we pass it on; SIGINT is
blocked in it except while it runs, so that none is lost and none comes in between. Into any
`concurrent.futures.Executor` a job goes as one picklable call, and comes back as one value.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeAlias

from penumbra.actors.console import interrupts
from penumbra.actors.console.errors import Interrupted, UsageError
from penumbra.actors.console.execute import Job, Outcome, execute
from penumbra.actors.console.progress import ProgressBars

_REDRAW_SECONDS = 0.1
_MOST_WORKERS = 2
_PATIENCE_SECONDS = 5.0


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


_Message: TypeAlias = Outcome | _Stopped | _Refused | _Failed


class WorkerFailed(Exception):
    """A run ended by a bug or was killed; the text says where."""


def run_all(
    jobs: Sequence[Job],
    n_workers: int | None = None,
    bars: ProgressBars | None = None,
    *,
    executor: Executor | None = None,
) -> list[Outcome]:
    """Run jobs and return their outcomes in order.

    Args:
        n_workers: Jobs at a time, each in a process of its own; None: as many as there are cores,
            at most two. One at a time runs in this process.
        executor: Takes the jobs instead, all at once: threads, processes or machines that can
            import this package and reach the folder of runs. It is left running. Ctrl-C then takes
            back what has not begun; what runs goes on to its end in the executor.

    Raises:
        UsageError: A job was refused; the others have been interrupted.
        Interrupted: Naming every folder left PARTIAL.
        WorkerFailed: A job ended by a bug; the others have been interrupted.
    """
    bars = bars or ProgressBars([job.source.file for job in jobs], quiet=True)
    if executor is not None:
        return _Submitted(executor, jobs, bars).work()
    n_workers = n_workers or min(_MOST_WORKERS, os.cpu_count() or 1)
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


class _Submitted:
    """Jobs in the hands of somebody's executor.

    Invariant: a job is pending or has its outcome.
    """

    def __init__(self, executor: Executor, jobs: Sequence[Job], bars: ProgressBars) -> None:
        self._bars = bars
        self._n_jobs = len(jobs)
        self._running: set[int] = set()
        self._outcomes: dict[int, Outcome] = {}
        self._pending = {executor.submit(attempt, job): i for i, job in enumerate(jobs)}

    def work(self) -> list[Outcome]:
        """Wait for all; whatever goes wrong, take back what has not begun."""
        try:
            while self._pending:
                done, _ = wait_for(self._pending, _REDRAW_SECONDS, FIRST_COMPLETED)
                self._show_running()
                for future in done:
                    self._take(future, self._pending.pop(future))
                self._bars.refresh()
        except BaseException as error:
            for future in self._pending:
                future.cancel()
            if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
                raise Interrupted([]) from None
            raise
        return [self._outcomes[number] for number in range(self._n_jobs)]

    def _show_running(self) -> None:
        for future, number in self._pending.items():
            if number not in self._running and future.running():
                self._running.add(number)
                self._bars.start(number)

    def _take(self, future: Future[_Message], number: int) -> None:
        try:
            message = future.result()
        except Exception as error:  # the executor's own: a lost worker, say
            raise WorkerFailed(f"the executor failed: {error!r}") from error
        self._outcomes[number] = outcome = _outcome_of(message)
        self._bars.end(number, outcome.verdict)


def attempt(job: Job, on_progress: Callable[[float], None] = lambda _: None) -> _Message:
    """Run one job and return what became of it; every failure is a value, which can be sent."""
    try:
        return execute(job, on_progress)
    except UsageError as error:
        return _Refused(error.file, error.place, error.cause)
    except Interrupted as interrupt:
        return _Stopped(interrupt.folders)
    except KeyboardInterrupt:
        return _Stopped([])
    except Exception:
        return _Failed(traceback.format_exc())


def _outcome_of(message: _Message) -> Outcome:
    match message:
        case Outcome():
            return message
        case _Refused():
            raise UsageError(message.file, message.place, message.cause)
        case _Stopped():
            raise Interrupted(message.folders)
        case _Failed():
            raise WorkerFailed(message.traceback)


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
            for connection, (_, process) in self._running.items():
                folders += _last_words(connection, process)
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
        self._outcomes[number] = outcome = _outcome_of(message)
        self._bars.end(number, outcome.verdict)


def _work(job: Job, connection: Connection) -> None:
    """Be a worker: run one job and say what became of it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    message: _Message
    try:
        with interrupts.admitted():
            message = attempt(job, connection.send)
    except KeyboardInterrupt:
        message = _Stopped([])
    with suppress(BrokenPipeError):  # who started us has been killed
        connection.send(message)


def _last_words(connection: Connection, process: BaseProcess) -> list[str]:
    """Return the folders that an interrupted worker names last.

    An interrupt may come to nothing where Python runs a callback from C, which prints and forgets
    it: a worker that goes on is interrupted again.
    """
    patience = time.monotonic() + _PATIENCE_SECONDS
    while True:
        if time.monotonic() > patience:
            _interrupt(process)
            patience = time.monotonic() + _PATIENCE_SECONDS
        if not connection.poll(_REDRAW_SECONDS):
            continue
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
