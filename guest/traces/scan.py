"""The byte loop over a lackey log: one pass, one line at a time.

Written for numba and given everything as an argument, so that the compiled code in numba's cache
depends on this file alone; as plain Python it does the same, slowly. What a reference line is, says
`logtext`, which does the same work without numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Places in `state`: where the scan stands in the text, lines, references and other lines so far.
AT, LINES, REFERENCES, OTHERS = 0, 1, 2, 3
N_STATE = 4

_NEWLINE, _SPACE, _COMMA, _ZERO, _I = 10, 32, 44, 48, 73
_SHORTEST = 14  # bytes of the shortest reference line, its newline included
_NO_DIGIT = 16
_NO_KIND = 255


def scan(
    text: Any,
    digits: Any,
    kinds: Any,
    kind: Any,
    address: Any,
    size: Any,
    others: Any,
    state: Any,
) -> None:
    """Go on from `state` to the end of the text, or until `others` is full.

    Args:
        text: uint8[], whole lines, the last one with its newline.
        digits: uint64[256], value of each hex digit, 16 for what is none.
        kinds: uint8[256], kind by a line's letter, 255 for what is none.
        kind: uint8[], with `address` (uint64[]) and `size` (int64[]) one row per reference; as
            long as `len(text) // 14`.
        others: int64[n, 4], first byte, end, line (from 0) and references before each other line.
        state: int64[4], see above; changed.
    """
    n_bytes = len(text)
    at, n_lines, n_references, n_others = state[AT], state[LINES], state[REFERENCES], state[OTHERS]
    while at < n_bytes and n_others < len(others):
        start = at
        found = _NO_KIND
        if n_bytes - start >= _SHORTEST and text[start + 2] == _SPACE:
            if text[start] == _SPACE and text[start + 1] != _I:
                found = kinds[text[start + 1]]
            elif text[start] == _I and text[start + 1] == _SPACE:
                found = kinds[_I]
        if found != _NO_KIND:
            # No loop passes the last newline, which is neither digit nor comma.
            value, seen = np.uint64(0), np.uint64(0)
            for place in range(start + 3, start + 11):  # the eight that must be there
                digit = digits[text[place]]
                seen |= digit
                value = value * np.uint64(16) + digit
            at = start + 11
            digit = digits[text[at]]
            while digit < _NO_DIGIT and at < start + 19:
                value = value * np.uint64(16) + digit
                at += 1
                digit = digits[text[at]]
            n_referred = 0
            if seen < _NO_DIGIT and text[at] == _COMMA:
                at += 1
                stop = at + 3
                while at < stop and _ZERO <= text[at] <= _ZERO + 9:
                    n_referred = n_referred * 10 + int(text[at]) - _ZERO
                    at += 1
            if n_referred > 0 and text[at] == _NEWLINE:
                kind[n_references] = found
                address[n_references] = value
                size[n_references] = n_referred
                n_references += 1
                n_lines += 1
                at += 1
                continue
        at = start
        while text[at] != _NEWLINE:
            at += 1
        others[n_others, 0] = start
        others[n_others, 1] = at
        others[n_others, 2] = n_lines
        others[n_others, 3] = n_references
        n_others += 1
        n_lines += 1
        at += 1
    state[AT], state[LINES], state[REFERENCES], state[OTHERS] = at, n_lines, n_references, n_others
