"""Files as an enemy or an accident leaves them: strategies for bytes, documents and arrays."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import assume
from hypothesis import strategies as st

Arrays = dict[str, npt.NDArray[Any]]

_TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["0x", "0x1000", "-1", "\x1b[2J", "9" * 400, "../../etc"])
)
_NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**300]),
)
# What TOML and JSON both know.
JUNK = st.recursive(
    st.one_of(st.booleans(), _NUMBERS, st.floats(), _TEXTS),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3), st.dictionaries(_TEXTS, inside, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes) -> bytes:
    """Cut a file, flip bytes, put noise inside, or take noise alone: never the file itself."""
    octets = draw(_spoilt(whole))
    assume(octets != whole)  # two flips of one byte may undo each other
    return octets


@st.composite
def _spoilt(draw: st.DrawFn, whole: bytes) -> bytes:
    how = draw(st.sampled_from(["cut", "flip", "flip", "insert", "repeat", "noise"]))
    if how == "noise":
        return draw(st.binary(max_size=200))
    at = draw(st.integers(0, len(whole) - 1))
    if how == "cut":
        return whole[:at]
    if how == "insert":
        return whole[:at] + draw(st.binary(min_size=1, max_size=20)) + whole[at:]
    if how == "repeat":
        return whole[:at] + whole[max(0, at - 50) :]
    octets = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        octets[draw(st.integers(0, len(octets) - 1))] ^= draw(st.integers(1, 255))
    return bytes(octets)


def places(document: Any) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a document of lists and tables, the root's first."""
    found: list[tuple[Any, ...]] = [()]
    keys: list[Any] = []
    if isinstance(document, dict):
        keys = list(document)
    elif isinstance(document, list):
        keys = list(range(len(document)))
    for key in keys:
        found += [(key, *path) for path in places(document[key])]
    return found


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """Put junk in the place of values, take some away, add some that nobody asked for."""
    document = deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        paths: list[tuple[Any, ...]] = places(document)[1:] or [()]
        path = draw(st.sampled_from(paths))
        if not path:
            return draw(JUNK)
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "replace":
            holder[path[-1]] = draw(JUNK)
        elif how == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(_TEXTS)] = draw(JUNK)
        else:
            holder.append(draw(JUNK))
    return document


@st.composite
def changed_arrays(draw: st.DrawFn, arrays: Arrays) -> Arrays:
    """Change shapes, types and numbers of arrays; drop some, and add one."""
    arrays = dict(arrays)
    for _ in range(draw(st.integers(1, 2))):
        if not arrays:
            break
        name = draw(st.sampled_from(sorted(arrays)))
        array = arrays[name]
        how = draw(st.sampled_from(["drop", "type", "shape", "short", "value", "value", "value"]))
        if how == "drop":
            del arrays[name]
        elif how == "type":
            kind = draw(st.sampled_from(["u1", "i8", "u8", "f4", "U3", "?", "M8[s]", ">u4"]))
            arrays[name] = np.zeros(array.shape, kind)
        elif how == "shape":
            arrays[name] = array.reshape(draw(st.sampled_from([(-1, 1), (1, -1), (-1,)])))
        elif how == "short":
            arrays[name] = array[: draw(st.integers(0, 2))]
        elif array.size:
            changed = array.copy()
            at = draw(st.integers(0, array.size - 1))
            limits = np.iinfo(changed.dtype) if changed.dtype.kind in "ui" else None
            if limits is not None:
                value = draw(st.integers(int(limits.min), int(limits.max)))
                changed.reshape(-1)[at] = value
            arrays[name] = changed
    if draw(st.booleans()):
        arrays[draw(st.sampled_from(["meta", "s0_frames", "more", "linear"]))] = np.zeros(3, "u1")
    return arrays
