"""The action queue: what the kernel wants a monitor to do, posted where the monitor looks.

The kernel cannot call into a monitor. It posts an action, and if the VCPU's world runs it sends a
check-action IPI. The monitor looks at the queue after each kernel call, before each resume of its
guest, and when that IPI stops direct execution: so an action waits no longer than one IPI latency.

Source: A40 ¶49-50.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from penumbra.hw.interrupts import NEVER


@dataclass(frozen=True, order=True)
class RaiseInterrupt:
    """Raise a virtual interrupt that is due at this guest progress."""

    due: int
    vector: int


class ActionQueue:
    """Actions for one VCPU, in order of due time, then of arrival.

    Attributes:
        next_due: Guest progress at which the first action has to be seen; `NEVER` if there is none.
    """

    def __init__(self) -> None:
        self._queue: list[tuple[int, int, RaiseInterrupt]] = []
        self._n_posted = 0
        self.next_due = NEVER

    def post(self, action: RaiseInterrupt) -> None:
        """Put an action in the queue."""
        heapq.heappush(self._queue, (action.due, self._n_posted, action))
        self._n_posted += 1
        self.next_due = self._queue[0][0]

    def take(self, progress: int) -> list[RaiseInterrupt]:
        """Remove and return the actions due by `progress`."""
        taken = []
        while self._queue and self._queue[0][0] <= progress:
            taken.append(heapq.heappop(self._queue)[2])
        self.next_due = self._queue[0][0] if self._queue else NEVER
        return taken
