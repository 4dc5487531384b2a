"""Interrupts of one CPU: inter-processor interrupts with a latency, and a one-shot timer.

All times are guest progress of the receiving CPU. An interrupt posted for time t is taken at the
first instruction boundary not yet passed, at or after t, while interrupts are enabled.
"""

from __future__ import annotations

import heapq

TIMER_VECTOR = 0x20
NEVER = 1 << 62


class InterruptController:
    """Pending interrupts of one CPU, in order of due time, then of arrival.

    Invariant: at most one timer deadline is armed.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, int, int]] = []
        self._n_posted = 0
        self._timer = NEVER

    def post(self, due: int, vector: int) -> None:
        """Queue an interrupt; equal vectors are not merged, each is taken."""
        heapq.heappush(self._pending, (due, self._n_posted, vector))
        self._n_posted += 1

    def arm_timer(self, deadline: int | None) -> None:
        """Set the timer's deadline, replacing the one before; None disarms it."""
        self._timer = NEVER if deadline is None else deadline

    @property
    def next_due(self) -> int:
        """Progress at which the next interrupt is due; `NEVER` if none is."""
        first = self._pending[0][0] if self._pending else NEVER
        return min(first, self._timer)

    def take(self, progress: int) -> int | None:
        """Remove and return the vector of the first interrupt due by `progress`, or None."""
        if self._pending and self._pending[0][0] <= min(progress, self._timer):
            return heapq.heappop(self._pending)[2]
        if self._timer <= progress:
            self._timer = NEVER
            return TIMER_VECTOR
        return None
