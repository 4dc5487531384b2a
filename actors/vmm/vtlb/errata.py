"""Where the text is wrong: each printed form is a switch, off by default.

A scheme names the printed forms it wants in `options.errata`; what each does and when it shows
stands in `docs/errata.md`. Every switch is one condition where the rule stands, never a copy of
the rule.

Source: VTLB Figs 5, 7-10; the errata's numbers are the project's own.
"""

from __future__ import annotations

ERRATA: dict[str, str] = {
    "ET1": "700: an active upper entry keeps R/W that the guest has taken away and flushed",
    "ET1b": "700: A of a guest upper entry is set only when its active entry is built",
    "ET2": "700: an active upper entry outlives P=0 in its guest entry",
    "ET3": "950: after CR0.WP 1 to 0 a supervisor's store to a read-only, dirty page is refused",
    "ET4": "710, 832: only P of the guest entry is looked at, so a denied store sets D",
    "ET5": "722, 844: a fault the guest's tables do not explain is delivered and never repaired",
    "ET6": "700: an active upper entry keeps U/S that the guest has taken away and flushed",
    "ET7": "1016: the eager fill takes the data of a dirty large page for a page table",
    "ET8": "894: an emptied active table is freed with its twin, and reused before others flush",
    "ET9": "706: the privilege level decides, not the access's own",
    "ET10": "510: privilege levels 1 and 2 count as user",
    "ET11": "508: an event that changes privilege and CR3 at once flushes nothing",
    "ET12": "730: PS counts without CR4.PSE; a change of CR4.PGE flushes nothing",
    "ET13": "406: one pair of hierarchies for all VCPUs of a VM, whatever their roots and modes",
    "ET14": "716, 838: an address where the VM has nothing is a machine check",
    "ET15": "712: the hardware's error code is delivered, and CR2 follows hidden faults",
}


def unknown(names: tuple[str, ...]) -> str | None:
    """Return the first name that is no erratum, or None."""
    return next((name for name in names if name not in ERRATA), None)
