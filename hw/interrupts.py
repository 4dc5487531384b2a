"""Interrupts of one CPU: inter-processor interrupts with a latency, and a one-shot timer.

All times are guest progress of the receiving CPU. An interrupt posted for time t is taken at the
first instruction boundary not yet passed, at or after t, while interrupts are enabled.

Vectors of devices (`DEVICE_VECTORS`) are in service from when they are taken until software says
that they have been served; the next of them waits until then, as at a local APIC.
"""

from __future__ import annotations

import heapq

TIMER_VECTOR = 0x20
DEVICE_VECTORS = range(0x50, 0x60)
DEVICE_TIMER_VECTOR = DEVICE_VECTORS[0]
NEVER = 1 << 62


class InterruptController:
    """Pending interrupts of one CPU, in order of due time, then of arrival.

    Invariant: at most one deadline is armed for each of the two timers, and at most one interrupt
    of a device is in service.

    Attributes:
        in_service: Vector of the device interrupt that was taken last, until it has been served.
        device_deadline: When the device timer is due, NEVER if it is not armed.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, int, int]] = []
        self._n_posted = 0
        self._timer = NEVER
        self._devices: list[tuple[int, int, int]] = []
        self.device_deadline = NEVER
        self.in_service: int | None = None
        self._device_due = NEVER  # of the next one that may be taken

    def post(self, due: int, vector: int) -> None:
        """Queue an interrupt; equal vectors are not merged, each is taken."""
        of_device = vector in DEVICE_VECTORS
        queue = self._devices if of_device else self._pending
        heapq.heappush(queue, (due, self._n_posted, vector))
        self._n_posted += 1
        if of_device:
            self._look()

    def arm_timer(self, deadline: int | None) -> None:
        """Set the timer's deadline, replacing the one before; None disarms it."""
        self._timer = NEVER if deadline is None else deadline

    def arm_device(self, deadline: int) -> None:
        """Set the device timer's deadline, replacing the one before; `NEVER` disarms it."""
        self.device_deadline = deadline
        self._look()

    def end(self) -> None:
        """The device interrupt in service has been served; without one nothing happens."""
        self.in_service = None
        self._look()

    def _look(self) -> None:
        first = self._devices[0][0] if self._devices else NEVER
        free = self.in_service is None
        self._device_due = min(first, self.device_deadline) if free else NEVER

    @property
    def next_due(self) -> int:
        """Progress at which the next interrupt is due; `NEVER` if none is."""
        first = self._pending[0][0] if self._pending else NEVER
        return min(first, self._timer, self._device_due)

    def take(self, progress: int) -> int | None:
        """Remove and return the vector of the first interrupt due by `progress`, or None."""
        if self._pending and self._pending[0][0] <= min(progress, self._timer):
            return heapq.heappop(self._pending)[2]
        if self._timer <= progress:
            self._timer = NEVER
            return TIMER_VECTOR
        return self._take_device() if self._device_due <= progress else None

    def _take_device(self) -> int:
        if self._devices and self._devices[0][0] <= self.device_deadline:
            vector = heapq.heappop(self._devices)[2]
        else:
            self.device_deadline, vector = NEVER, DEVICE_TIMER_VECTOR
        self.in_service = vector
        self._look()
        return vector
