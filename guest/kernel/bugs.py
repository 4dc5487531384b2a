"""Bugs a guest kernel can have, as switches: what a checker of flushes must be able to name."""

from __future__ import annotations

GUEST_BUGS = {
    "skip-local-invlpg": "the CPU that changes an entry does not flush its own TLB",
    "skip-shootdown": "other CPUs are not told to flush",
    "late-shootdown": "other CPUs are told to flush only after the frames were given away",
    "short-range": "the last page of every flushed range is left out, a single page included",
    "early-acknowledge": "a CPU acknowledges a shootdown before it has flushed",
    "reuse-before-flush": "unmapped frames are given away before the flush",
    "promote-without-flush": "a large page takes the place of small ones that no CPU has flushed",
}


def check_bugs(bugs: frozenset[str]) -> None:
    """Refuse names that are no switch.

    Raises:
        ValueError: Naming the unknown ones and all that exist.
    """
    unknown = sorted(bugs - GUEST_BUGS.keys())
    if unknown:
        known = ", ".join(GUEST_BUGS)
        raise ValueError(f"no such guest bug: {', '.join(unknown)} (known: {known})")
