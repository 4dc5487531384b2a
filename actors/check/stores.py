"""Which VCPU made which store to a table.

The tap of a store does not say who stored. But a VCPU's access to the frame is reported right
before its store, where hardware makes it, or right behind, where a monitor makes it on the guest's
behalf. Each report is used once; a store without one is of nobody known: a device, say.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

NOBODY = -1
_NO_WRITE = (NOBODY, -1)
_MAX_STORES = 1 << 20


class Stores:
    """The latest million stores to tables, by the oracle's time.

    Invariant: times rise, and each has a VCPU or NOBODY.
    """

    def __init__(self) -> None:
        self._times = array("Q")
        self._vcpus = array("h")
        self._last_write = _NO_WRITE
        self._unclaimed = -1

    def check(self) -> None:
        """Assert the invariant."""
        assert len(self._times) == len(self._vcpus)
        assert all(a < b for a, b in zip(self._times, self._times[1:], strict=False))

    def write(self, vcpu: int, pfn: int) -> None:
        """A supervisor writes to a machine frame."""
        if self._unclaimed == pfn:
            self._vcpus[-1] = vcpu
            self._unclaimed = -1
        else:
            self._last_write = vcpu, pfn

    def store(self, now: int, pfn: int) -> None:
        """A store to a table in a machine frame has become visible."""
        vcpu, into = self._last_write
        self._last_write = _NO_WRITE
        self._unclaimed = -1 if into == pfn else pfn
        self._times.append(now)
        self._vcpus.append(vcpu if into == pfn else NOBODY)
        if len(self._times) > _MAX_STORES:
            del self._times[: _MAX_STORES // 2]
            del self._vcpus[: _MAX_STORES // 2]

    def by(self, time: int) -> int:
        """Return the VCPU that made the store of a time, or NOBODY."""
        at = bisect_left(self._times, time)
        found = at < len(self._times) and self._times[at] == time
        return self._vcpus[at] if found else NOBODY
