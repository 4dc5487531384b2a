"""What became of each guest process: its end, and a digest of the memory it left.

The digest covers every user page of the process that is not all zero, by guest-virtual page number
and content, read through the guest's own tables at its exit. Physical placement does not enter, so
digests of equal runs are equal under every scheme.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.hw.formats import NX, PAGE_SHIFT, PS, FormatSpec, P, U
from penumbra.hw.operations import Mark


@dataclass
class ProcessRecord:
    """One guest process: why it ended (empty while it runs) and its memory then."""

    pid: int
    name: str
    ended: str = ""
    pages: int = 0
    digest: str = ""


class ProcessLedger:
    """Follows the guest's marks."""

    def __init__(
        self, spec: FormatSpec, memory: MemoryManagement, swapped: Callable[[int], bytes | None]
    ) -> None:
        self._spec = spec
        self._swapped = swapped
        self._memory = memory
        self.records: dict[int, ProcessRecord] = {}
        self.marks: list[tuple[str, tuple[int, ...], str]] = []

    def mark(self, mark: Mark) -> None:
        """Take one mark of the guest."""
        if mark.what == "process_start":
            self.records[mark.args[0]] = ProcessRecord(mark.args[0], mark.text)
        elif mark.what == "process_exit":
            record = self.records[mark.args[0]]
            _, root_gpa, code = mark.args
            record.ended = mark.text or f"exit {code}"
            record.pages, record.digest = self._digest(root_gpa)
        elif mark.what not in ("thread", "process_exec"):
            self.marks.append((mark.what, mark.args, mark.text))

    def _digest(self, root_gpa: int) -> tuple[int, str]:
        """Count and hash the user pages below a root."""
        sha = hashlib.sha256()
        n = 0
        for vpn, leaf in self._all_leaves(root_gpa):
            page = leaf if isinstance(leaf, bytes) else self._page(leaf)
            if page.count(0) < len(page):
                n += 1
                sha.update(vpn.to_bytes(8, "little"))
                sha.update(page)
        return n, sha.hexdigest()[:16]

    def _page(self, gfn: int) -> bytes:
        return self._memory.page(gfn)

    def _all_leaves(self, root_gpa: int) -> list[tuple[int, int | bytes]]:
        """Return what `_leaves` does for a root; one held in registers has no rights."""
        spec = self._spec
        if not spec.root_registers:
            return self._leaves(root_gpa >> PAGE_SHIFT, spec.top, 0)
        found: list[tuple[int, int | bytes]] = []
        for index in range(spec.root_registers):
            entry = self._memory.load(root_gpa + index * spec.entry_bytes, spec.entry_bytes)
            if entry & P:
                base = index << (spec.levels[spec.top].shift - PAGE_SHIFT)
                table = (entry & spec.frame_mask) >> PAGE_SHIFT
                found += self._leaves(table, spec.top - 1, base)
        return found

    def _leaves(self, gfn: int, level: int, base: int) -> list[tuple[int, int | bytes]]:
        """Return page number and guest frame of every user page under a table.

        In place of the frame stand the page's bytes where the guest has it on its disk.
        """
        spec, memory = self._spec, self._memory
        table = np.frombuffer(memory.page(gfn), np.uint64 if spec.entry_bytes == 8 else np.uint32)
        entries = table.astype(np.uint64)
        found: list[tuple[int, int | bytes]] = []
        for index in np.flatnonzero(entries).tolist():
            entry = int(entries[index])
            vpn = base + (index << (spec.levels[level].shift - PAGE_SHIFT))
            if entry & (P | U) != P | U:
                page = None if level or entry & P else self._swapped(entry)
                if page is not None:
                    found.append((vpn, page))
                continue
            frame = (entry & spec.frame_mask & ~NX) >> PAGE_SHIFT
            if level == 0:
                found.append((vpn, frame))
            elif entry & PS and spec.levels[level].large:
                n = 1 << (spec.levels[level].shift - PAGE_SHIFT)
                found += [(vpn + i, frame + i) for i in range(n)]
            else:
                found += self._leaves(frame, level - 1, vpn)
        return found
