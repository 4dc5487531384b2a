"""What one VCPU may still hold in its caches: the times that close windows.

Time is the oracle's own count of stores and events: `t` is the state after the t-th of them. An
item loaded at time t is gone after a covering event numbered u > t. Two kinds of item:

    a complete translation   gone at INVLPG or a delivered fault in its page (all of a large page),
                             at MOV CR3 unless global, at a change of mode
    an upper-level entry     gone at INVLPG of any address, MOV CR3, a change of mode, and at a
                             delivered fault whose walk uses the same prefix of the address

A translation needs the last time at which it could be loaded to be no earlier than `floor`. An
upper-level entry needs the first covering event after its last load: `next_upper_close`. For the
latter only events matter that follow the end of some loadable upper-level value (a *marker*), so
the lists stay short in a guest that changes leaves only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import NamedTuple

from .paging import Format, Mode

NEVER = 1 << 62
_MAX_UPPER_EVENTS = 1 << 14
_MAX_ROOTS = 1 << 10
_N_REMEMBERED = 64


class RootSpan(NamedTuple):
    """A root table was loaded in CR3 at the times from `start` to before `end`."""

    start: int
    end: int
    gfn: int


class Closing(NamedTuple):
    """An event that closed windows, kept for reports."""

    seq: int
    what: str
    value: int


_NO_MODE = Mode(paging=False, pse=False, pge=False, pae=False, nxe=False)


class Windows:
    """The closing events of one VCPU, and its root.

    Invariant: with paging on the last of `roots` is open and no other is; with paging off there is
    none. Upper-level entries loaded under a root are gone when its span ends.

    Attributes:
        mode: Paging is off in it until the registers have been told.
        all_closed: Time of the last event that dropped everything, globals included.
        local_closed: Time of the last event that dropped everything but globals.
        upper_closed: Time of the last event that dropped all upper-level entries.
    """

    def __init__(self, form: Format, vcpu: int) -> None:
        n_levels = len(form.levels)
        self.vcpu = vcpu
        self.cr0 = self.cr3 = self.cr4 = self.efer = 0
        self.mode = _NO_MODE
        self.all_closed = self.local_closed = self.upper_closed = 0
        self.roots: list[RootSpan] = []
        self.recent: deque[Closing] = deque(maxlen=_N_REMEMBERED)
        self._shifts = tuple(shift for _, shift in form.levels)
        self._page_levels = (0, *form.large_levels)
        self._page_closed: list[dict[int, int]] = [{} for _ in range(n_levels)]
        self._upper_events: list[int] = []
        self._upper_faults: list[dict[int, list[int]]] = [{} for _ in range(n_levels)]

    def check(self) -> None:
        """Assert the invariant."""
        assert all(span.start <= span.end for span in self.roots)
        assert all(span.end < NEVER for span in self.roots[:-1])
        assert self.mode.paging == bool(self.roots)
        assert self._upper_events == sorted(self._upper_events)

    @property
    def root(self) -> int | None:
        """Guest frame of the present root table; None with paging off."""
        return self.roots[-1].gfn if self.roots else None

    def invlpg(self, seq: int, gva: int, marker: int) -> None:
        """Close what INVLPG closes; `marker` is when an upper-level value last ended."""
        self._close_page(seq, gva)
        self._close_upper(seq, marker)
        self.recent.append(Closing(seq, "INVLPG", gva))

    def fault(self, seq: int, gva: int, marker: int) -> None:
        """Close the windows of the page, and of the upper-level entries that its walk uses."""
        self._close_page(seq, gva)
        self.recent.append(Closing(seq, "#PF", gva))
        if marker <= self.upper_closed:
            return
        for level in range(1, len(self._shifts)):
            self._upper_faults[level].setdefault(gva >> self._shifts[level], []).append(seq)

    def load_root(self, seq: int, gfn: int, value: int, marker: int, *, keep_globals: bool) -> None:
        """MOV CR3: a new root, or the same one again."""
        self.local_closed = seq
        self.recent.append(Closing(seq, "CR3", value))
        if not keep_globals:
            self.upper_closed = seq
            self._forget_closings()
            self.roots = [RootSpan(seq, NEVER, gfn)]
            return
        self._close_upper(seq, marker)
        if self.roots[-1].gfn != gfn:
            self.roots[-1] = self.roots[-1]._replace(end=seq)
            self.roots.append(RootSpan(seq, NEVER, gfn))
            self._shorten()

    def change_mode(self, seq: int, gfn: int | None, what: str, value: int) -> None:
        """Drop everything: paging, PSE, PGE or PAE has changed. `gfn` is None with paging off."""
        self.all_closed = self.local_closed = self.upper_closed = seq
        self._forget_closings()
        self.roots = [] if gfn is None else [RootSpan(seq, NEVER, gfn)]
        self.recent.append(Closing(seq, what, value))

    def floor(self, level: int, gva: int, is_global: bool) -> int:
        """Return the first time whose loads of a translation at `level` may be cached now."""
        page = self._page_closed[level].get(gva >> self._shifts[level], 0)
        return max(page, self.all_closed if is_global else self.local_closed)

    def next_upper_close(self, level: int, gva: int, time: int) -> int:
        """Return the first event at or after `time` that drops the upper entry used by `gva`."""
        if time >= NEVER:
            return NEVER
        found = _first_from(self._upper_events, time)
        faults = self._upper_faults[level].get(gva >> self._shifts[level])
        return min(found, _first_from(faults, time)) if faults else found

    def closing_after(self, time: int, level: int, gva: int, is_global: bool) -> str:
        """Name the event from `time` on that closed a page's window; "" if none did."""
        if self.floor(level, gva, is_global) < time:
            return ""
        shift = self._shifts[level]
        for closing in self.recent:
            if closing.seq < time or (is_global and closing.what == "CR3"):
                continue
            whole = closing.what not in ("INVLPG", "#PF")
            if whole or closing.value >> shift == gva >> shift:
                return f"{closing.what}({closing.value:#x}) #{closing.seq} of VCPU {self.vcpu}"
        return f"an event of VCPU {self.vcpu} up to #{self.floor(level, gva, is_global)}"

    def _close_page(self, seq: int, gva: int) -> None:
        for level in self._page_levels:
            self._page_closed[level][gva >> self._shifts[level]] = seq

    def _close_upper(self, seq: int, marker: int) -> None:
        if marker > self.upper_closed:
            self._upper_events.append(seq)
            self._shorten()
        self.upper_closed = seq

    def _forget_closings(self) -> None:
        self._upper_events.clear()
        for level in range(len(self._shifts)):
            self._page_closed[level].clear()
            self._upper_faults[level].clear()

    def _shorten(self) -> None:
        # Reached only by guests with global pages or without MOV CR3. What is lost here can make
        # the oracle accept more (an event or the gap between two spans is forgotten), never less.
        if len(self._upper_events) > _MAX_UPPER_EVENTS:
            del self._upper_events[: _MAX_UPPER_EVENTS // 2]
            for by_prefix in self._upper_faults:
                by_prefix.clear()
        if len(self.roots) > _MAX_ROOTS:
            self.roots = _merge_old(self.roots)


def _first_from(times: list[int], time: int) -> int:
    at = bisect_left(times, time)
    return times[at] if at < len(times) else NEVER


def _merge_old(roots: list[RootSpan]) -> list[RootSpan]:
    """Make one span of all the older spans of each root, and keep the newer half as it is."""
    middle = len(roots) // 2
    hulls: dict[int, RootSpan] = {}
    for span in roots[:middle]:
        first = hulls.get(span.gfn, span)
        hulls[span.gfn] = RootSpan(first.start, span.end, span.gfn)
    return [*hulls.values(), *roots[middle:]]
