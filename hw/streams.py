"""Access streams: the memory references of one recorded process, as page runs.

A run is `count` references of one kind to one page, in the order of their first reference. Each run
is one 64-bit word so that an engine reads one record where a program made up to a thousand
references:

    bits 0-1    kind: 0 data read, 1 data write (any reference of the run wrote), 2 fetch
    bits 2-13   offset in the page of the first store of a write run, else of the first reference
    bits 14-39  count, 1 .. 2**26 - 1
    bits 40-62  index of the page in `pages`
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

READ, WRITE, FETCH = 0, 1, 2
OFFSET_SHIFT, COUNT_SHIFT, PAGE_SHIFT = 2, 14, 40
MAX_COUNT = (1 << 26) - 1
MAX_PAGES = 1 << 23
MAX_VPN = 1 << 36
MAX_SALT = 1 << 23  # so that a stored value stays a positive int64


@dataclass(frozen=True, eq=False)
class AccessStream:
    """One process's references; equal when pages, runs and salt are.

    Invariant: pages are distinct; every run's page index is below `len(pages)`, its count is at
    least 1 and its kind one of the three. Engines rely on it and do not look again.

    Attributes:
        pages: int64[n_pages], guest-virtual page numbers, each once, in order of first reference.
        runs: int64[n_runs], packed as the module's docstring says.
        salt: Upper bits, from bit 40, of each value the write runs store: below 2**23, distinct
            per process.
    """

    pages: npt.NDArray[np.int64]
    runs: npt.NDArray[np.int64]
    salt: int

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AccessStream)
            and self.salt == other.salt
            and np.array_equal(self.pages, other.pages)
            and np.array_equal(self.runs, other.runs)
        )

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    def check(self) -> None:
        problem = self.problem()
        assert problem is None, problem

    def problem(self) -> str | None:
        """Name the first broken invariant, or None: for readers of files that others wrote."""
        if self.pages.dtype != np.int64 or self.runs.dtype != np.int64:
            return "columns are not int64"
        if len(self.pages) > MAX_PAGES:
            return f"{len(self.pages)} pages"
        if not 0 <= self.salt < MAX_SALT:
            return f"salt {self.salt}"
        if len(self.pages) and not 0 <= int(self.pages.min()) <= int(self.pages.max()) < MAX_VPN:
            return "a page number that no address has"
        if len(np.unique(self.pages)) != len(self.pages):
            return "a page is listed twice"
        if not len(self.runs):
            return None
        if int(self.runs.min()) < 0 or int((self.runs >> PAGE_SHIFT).max()) >= len(self.pages):
            return "a run's page is not listed"
        if int(((self.runs >> COUNT_SHIFT) & MAX_COUNT).min()) < 1:
            return "a run without references"
        if int((self.runs & 3).max()) > FETCH:
            return "a run of no known kind"
        return None

    @property
    def n_references(self) -> int:
        return int(((self.runs >> COUNT_SHIFT) & MAX_COUNT).sum())


def pack_runs(
    page: npt.NDArray[np.int64],
    kind: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Pack four equally long int64 columns into run words."""
    return (page << PAGE_SHIFT) | (count << COUNT_SHIFT) | (offset << OFFSET_SHIFT) | kind
