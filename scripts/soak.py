"""Run random machines for MINUTES, with draws that no run has made before: `just soak MINUTES`.

Progress goes to stderr, one line in ten seconds. Each draw that fails is printed as the file that
replays it, made smaller as far as it still fails; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from random_machines import token
from random_runs import Campaign, complaint, smaller

from penumbra.actors.console.config import RunConfig

_EVERY = 10.0
_MOST_MINUTES = 7 * 24 * 60


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak", description="Run random machines for a while.")
    parser.add_argument("minutes", type=_minutes, metavar="MINUTES")
    parser.add_argument("--first", type=int, help="number of the first draw; else a fresh one")
    parser.add_argument("--as-drawn", action="store_true", help="print failures as they were drawn")
    given = parser.parse_args(arguments)
    first = secrets.randbelow(1 << 48) if given.first is None else given.first
    print(f"soak: draws from number {first} on", file=sys.stderr)
    campaign = Campaign(given.minutes * 60, on_run=_Progress(first, as_drawn=given.as_drawn))
    campaign.run(first)
    print(f"soak: {campaign.n_runs} runs, {len(campaign.failures)} failed", file=sys.stderr)
    return 1 if campaign.failures else 0


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= _MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"{text}: a number of minutes up to {_MOST_MINUTES}")
    return minutes


class _Progress:
    """Prints what fails at once, and now and then how far the campaign is."""

    def __init__(self, first: int, *, as_drawn: bool) -> None:
        self._first = first
        self._as_drawn = as_drawn
        self._n_failed = 0
        self._said = time.monotonic()

    def __call__(self, number: int, case: RunConfig, wrong: str | None) -> None:
        if wrong:
            self._n_failed += 1
            small = case if self._as_drawn else smaller(case, lambda one: bool(complaint(one)))
            cause = "\n".join(f"# {line}" for line in wrong.rstrip().splitlines())
            print(f"# draw {self._first + number - 1}\n{token(small)}{cause}\n", flush=True)
        if time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            print(f"soak: {number} runs, {self._n_failed} failed", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
