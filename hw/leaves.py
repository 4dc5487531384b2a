"""Every leaf that a set of page tables holds, level by level, without asking the MMU.

Reads no registers and checks no rights: what is listed is what is present, with the leaf's own
bits. Tables are looked up by frame in a sorted list, so a snapshot that holds nothing but its
tables is enough.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, PS, FormatSpec, P

MOST_TABLES = 1 << 16

Words = npt.NDArray[np.uint64]


class Leaves(NamedTuple):
    """Leaves in order of address: linear address, physical address, entry, level."""

    linear: Words
    physical: Words
    entry: Words
    level: npt.NDArray[np.uint8]


class TooManyTablesError(Exception):
    """Tables that point at each other so often that their leaves cannot be listed."""


def list_leaves(
    spec: FormatSpec,
    root: int,
    frames: npt.NDArray[np.uint32],
    pages: npt.NDArray[np.uint8],
    *,
    pse: bool,
) -> Leaves:
    """List every present leaf below `root`.

    Args:
        root: CR3; bits outside the root's address are ignored.
        frames: Frame numbers of all tables, ascending; a table that is not among them is empty.
        pages: uint8[n, 4096], their contents.
        pse: Whether CR4.PSE lets large pages count where the format asks for it.

    Raises:
        TooManyTablesError: More than `MOST_TABLES` tables are in use at one level.
    """
    dtype = np.dtype("<u8") if spec.entry_bytes == 8 else np.dtype("<u4")
    tables = np.ascontiguousarray(pages).view(dtype)
    root &= spec.root_mask
    wanted = np.array([root >> PAGE_SHIFT], np.uint64)
    first = np.zeros(1, np.uint64)
    found: list[Leaves] = []
    for number in range(spec.top, -1, -1):
        level = spec.levels[number]
        at, first = _among(frames, wanted, first)
        entries = tables[at].astype(np.uint64)
        if number == spec.top:
            skip = (root & (PAGE_BYTES - 1)) // spec.entry_bytes
            entries = entries[:, skip : skip + level.n_entries]
        row, index = np.nonzero(entries & np.uint64(P))
        chosen = entries[row, index]
        linear = first[row] + (index.astype(np.uint64) << np.uint64(level.shift))
        large = np.full(len(chosen), number == 0)
        if level.large and (pse or not spec.large_needs_pse):
            large |= chosen & np.uint64(PS) != 0
        leaf = chosen[large]
        base = _base(spec, number, leaf)
        found.append(Leaves(linear[large], base, leaf, np.full(len(leaf), number, np.uint8)))
        wanted = (chosen[~large] & np.uint64(spec.frame_mask)) >> np.uint64(PAGE_SHIFT)
        first = linear[~large]
        if len(wanted) > MOST_TABLES:
            raise TooManyTablesError(f"more than {MOST_TABLES} tables at level {number - 1}")
    return _sorted(spec, found)


def _among(frames: npt.NDArray[np.uint32], wanted: Words, first: Words) -> tuple[Words, Words]:
    """Return the rows of the tables wanted, and the first addresses of those that are there."""
    at = np.searchsorted(frames, wanted)
    there = at < len(frames)
    there[there] = frames[at[there]] == wanted[there]
    return at[there].astype(np.uint64), first[there]


def _base(spec: FormatSpec, number: int, leaf: Words) -> Words:
    """Return the physical addresses of the pages that leaves at one level map."""
    span = np.uint64((1 << spec.levels[number].shift) - 1)
    base = leaf & np.uint64(spec.frame_mask) & ~span
    if number and spec.pse36:
        base |= (leaf >> np.uint64(13) & np.uint64(0xFF)) << np.uint64(32)
    return base


def _sorted(spec: FormatSpec, found: list[Leaves]) -> Leaves:
    linear = np.concatenate([part.linear for part in found])
    if spec.sign_extended:
        sign = np.uint64(1 << (spec.va_bits - 1))
        linear = (linear ^ sign) - sign
    order = np.argsort(linear, kind="stable")
    return Leaves(
        linear[order],
        np.concatenate([part.physical for part in found])[order],
        np.concatenate([part.entry for part in found])[order],
        np.concatenate([part.level for part in found])[order],
    )
