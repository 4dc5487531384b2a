"""What an earlier comparison has left complete, taken up instead of run again.

A run's id says what it ran and with which sources; its folder says that it was finished, and by a
hash that it is as it was then. A verdict counts only if today's checker gave it.
"""

from __future__ import annotations

import json

import msgspec

from penumbra.actors.check import Verdict
from penumbra.actors.console.execute import Job, Outcome, judgement
from penumbra.actors.console.prepare import Prepared, prepare
from penumbra.actors.console.version import checker_digest
from penumbra.actors.observe import is_whole


def recall(job: Job) -> Outcome | None:
    """Return what a job has left complete, or None if it is to be run.

    Raises:
        UsageError: The configuration cannot be used.
    """
    ready = prepare(job)
    if not is_whole(ready.folder, ready.text):
        return None
    try:
        return _read(ready)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _read(ready: Prepared) -> Outcome | None:
    rows = json.loads((ready.folder / "wall.json").read_bytes())
    verdict = None
    if ready.job.how.check:
        checked = [row for row in rows if row["checked"]]
        if not checked or checked[-1]["checker"] != checker_digest():
            return None
        data = (ready.folder / "verdict.json").read_bytes()
        verdict = msgspec.json.decode(data, type=Verdict)
    return Outcome(
        scheme=ready.config.scheme.name,
        workload=ready.chosen.workload.name,
        folder=str(ready.folder),
        repeats=True,
        capacity=ready.config.scheme.options.capacity,
        summary=json.loads((ready.folder / "summary.json").read_bytes()),
        engine=rows[-1]["engine"],
        wall=rows[-1]["seconds"],
        reused=True,
        **judgement(verdict),
    )
