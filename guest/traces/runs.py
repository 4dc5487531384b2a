"""References to page runs.

A run is (page, stream, count, any write, offset of the first store). The runs of a process are one
sequence in order of first reference; one fetch run and one data run may be open at a time; a run
closes when its own stream changes page, or at a system call. A reference that crosses a page
counts once on each of the two pages.

So each stream is collapsed by itself and the two are merged by the place of their first reference.
A reference is a run of one, and collapsing runs that were collapsed block by block gives what
collapsing them at once would: the same function does both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penumbra.hw.streams import FETCH, MAX_COUNT, WRITE, AccessStream, pack_runs

Column = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Runs:
    """Runs of one stream: equally long columns.

    Attributes:
        first: Place of the first reference in the whole process.
        page: Virtual page number.
        after: Number of system calls before it.
        count: References.
        kind: READ, WRITE or FETCH.
        offset: Offset of the first store, or of the first reference where there is none.
    """

    first: Column
    page: Column
    after: npt.NDArray[np.int32]
    count: Column
    kind: npt.NDArray[np.uint8]
    offset: npt.NDArray[np.uint16]

    def collapse(self) -> _Runs:
        """Join neighbours on one page with no system call between them."""
        n = len(self.page)
        if not n:
            return self
        is_head = np.ones(n, bool)
        is_head[1:] = (self.page[1:] != self.page[:-1]) | (self.after[1:] != self.after[:-1])
        head = np.flatnonzero(is_head)
        stores = np.append(np.flatnonzero(self.kind == WRITE), n)
        first_store = stores[np.searchsorted(stores, head)]
        source = np.where(first_store < np.append(head[1:], n), first_store, head)
        return _Runs(
            self.first[head],
            self.page[head],
            self.after[head],
            np.add.reduceat(self.count, head),
            self.kind[source],
            self.offset[source],
        )


class RunBuilder:
    """Collects one process's references, block by block."""

    def __init__(self) -> None:
        self._fetches: list[_Runs] = []
        self._data: list[_Runs] = []
        self._calls: list[int] = []
        self._n_references = 0

    def add(
        self,
        kind: npt.NDArray[np.uint8],
        address: npt.NDArray[np.uint64],
        size: Column,
        calls: list[int],
    ) -> None:
        """Append references.

        Args:
            kind: READ, WRITE or FETCH each.
            address: First byte of each.
            size: Bytes of each, at most one page.
            calls: For each system call among them, how many of them precede it; ascending.
        """
        page = (address >> np.uint64(12)).astype(np.int64)
        offset = (address & np.uint64(0xFFF)).astype(np.int64)
        crosses = offset + size > 4096
        call_places = np.array(calls, np.int64)
        if crosses.any():
            n_before = np.concatenate(([0], np.cumsum(crosses)))
            call_places = call_places + n_before[call_places]
            second = np.flatnonzero(crosses) + n_before[1:][crosses]
            source = np.repeat(np.arange(len(page)), crosses + 1)
            page, offset, kind = page[source], offset[source], kind[source]
            page[second] += 1
            offset[second] = 0
        for blocks, is_mine in ((self._fetches, kind == FETCH), (self._data, kind != FETCH)):
            index = np.flatnonzero(is_mine)
            after = np.searchsorted(call_places, index, side="right") + len(self._calls)
            references = _Runs(
                index + self._n_references,
                page[index],
                after.astype(np.int32),
                np.ones(len(index), np.int64),
                kind[index],
                offset[index].astype(np.uint16),
            )
            blocks.append(references.collapse())
        self._calls.extend((call_places + self._n_references).tolist())
        self._n_references += len(page)

    def finish(self, salt: int) -> tuple[AccessStream, list[int]]:
        """Close all runs; also the run index before which each system call happened."""
        parts = [_joined(blocks).collapse() for blocks in (self._fetches, self._data)]
        first = np.concatenate([part.first for part in parts])
        order = np.argsort(first, kind="stable")  # two sorted halves: a merge
        first = first[order]
        vpn, kind, count, offset = (
            np.concatenate([getattr(part, name) for part in parts])[order].astype(np.int64)
            for name in ("page", "kind", "count", "offset")
        )
        n_words = -(-count // MAX_COUNT)  # a longer run than a word can count becomes several
        if len(n_words) and int(n_words.max()) > 1:
            source = np.repeat(np.arange(len(first)), n_words)
            is_last = np.append(source[1:] != source[:-1], True)
            tail = (count - (n_words - 1) * MAX_COUNT)[source]
            count = np.where(is_last, tail, MAX_COUNT)
            first, vpn, kind, offset = first[source], vpn[source], kind[source], offset[source]
        pages, index = number_by_first_use(vpn)
        stream = AccessStream(pages, pack_runs(index, kind, count, offset), salt)
        return stream, np.searchsorted(first, np.array(self._calls, np.int64)).tolist()


def number_by_first_use(values: Column) -> tuple[Column, Column]:
    """Distinct values in order of first occurrence, and each value's number."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[inverse]


def _joined(blocks: list[_Runs]) -> _Runs:
    if not blocks:
        nothing = np.zeros(0, np.int64)
        return _Runs(nothing, nothing, nothing.astype(np.int32), nothing,
                     nothing.astype(np.uint8), nothing.astype(np.uint16))  # fmt: skip
    return _Runs(
        *(np.concatenate([getattr(b, name) for b in blocks]) for name in _Runs.__dataclass_fields__)
    )
