"""One access, one fault: is it explained by the present tables, by a cache, or by nothing?"""

from __future__ import annotations

from .paging import write_protect
from .tables import Tables
from .walks import Walk, walk_now, walks_allowed
from .windows import Windows

WRONG, STALE, FRESH = 0, 1, 2


class Judge:
    """Decides; changes nothing but its memory of the older translations found legal.

    Invariant: `_legal` holds verdicts of the time `_legal_at` only. Within one time nothing can
    make a translation illegal: events and stores advance it, and hardware only sets A and D.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._legal: set[tuple[int, int, int, bool, int]] = set()
        self._legal_at = 0

    def access(
        self, vcpu: Windows, gva: int, kind: int, user: bool, pfn: int
    ) -> tuple[int, Walk | None]:
        """Judge an access by a machine frame; if FRESH, return the walk that explains it, too."""
        tables = self._tables
        linear = tables.form.linear(gva)
        if linear is None:
            return WRONG, None
        walk = walk_now(tables, vcpu, linear)
        protected, smep = write_protect(vcpu.cr0), vcpu.mode.smep
        serves = tables.frames.serves
        if walk.allows(kind, user, protected, smep) and serves(pfn, walk.gfn):
            return FRESH, walk
        if self._legal_at != tables.now:
            self._legal.clear()
            self._legal_at = tables.now
        key = (vcpu.vcpu, linear >> 12, kind, user, pfn)
        if key in self._legal:
            return STALE, None
        for other in walks_allowed(tables, vcpu, linear):
            allowed = other.cached and other.allows(kind, user, protected, smep)
            if allowed and serves(pfn, other.gfn):
                self._legal.add(key)
                return STALE, None
        return WRONG, None

    def fault(self, vcpu: Windows, gva: int, kind: int, user: bool, error: int) -> int:
        """Judge a page fault delivered with an error code."""
        tables = self._tables
        linear = tables.form.linear(gva)
        if linear is None or vcpu.root is None:
            return WRONG
        if walk_now(tables, vcpu, linear).error(kind, user, vcpu) == error:
            return FRESH
        for walk in walks_allowed(tables, vcpu, linear):
            if walk.error(kind, user, vcpu) == error:
                return STALE
        return WRONG
