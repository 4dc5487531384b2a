"""A coherence scheme is a value: four policies and their options.

*Detect*: how the monitor learns that a guest page table changed. *Propagate*: how the other CPUs'
sub-VMMs learn it. *Apply*: what becomes of the derived entry. *Shadow*: whose derived tables there
are. `native` has the same shape with all of them empty. Adding a scheme touches no driver.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Detect = Literal["none", "write-trace", "out-of-sync"]
Propagate = Literal["none", "shootdown", "patch"]
Apply = Literal["none", "update", "invalidate"]
Shadow = Literal["none", "per-cpu", "per-privilege", "nested"]


class SchemeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the policies.

    Attributes:
        capacity: Patches per channel of the matrix (A40 Fig. 9).
        tell_all: Leave out step 832: every consumer is told of every change.
        shadow_pages: Shadow page-table pages per VCPU before the least recently used is dropped.
        flood: Traced stores to one guest table without a fill through it, after which its trace and
            its shadows are dropped; 0 never.
        order: Name of the patch channel's step order (`penumbra list faults`).
        unsync: Leaf tables that may be out of sync at a time (detect "out-of-sync"); a store that
            crosses from one to another needs two.
        prefetch: Leaf entries of one guest table derived with each fill: the aligned group that the
            filled one is of; 0 or 1 it alone.
        prefetch_invlpg: Derive the leaf of an invalidated address at once.
        root_cache: Previous roots whose shadows are kept; None all, while shadow memory lasts.
        share_roles: One shadow page for a guest table in one role, wherever it is linked; else one
            for each place.
    """

    capacity: int = 64
    tell_all: bool = False
    shadow_pages: int = 1024
    flood: int = 0
    order: str = "correct"
    unsync: int = 1024
    prefetch: int = 0
    prefetch_invlpg: bool = False
    root_cache: int | None = None
    share_roles: bool = True


class Scheme(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One composition. Source: requirements S1."""

    name: str
    detect: Detect = "none"
    propagate: Propagate = "none"
    apply: Apply = "none"
    shadow: Shadow = "none"
    options: SchemeOptions = SchemeOptions()
    about: str = ""

    def problem(self) -> str | None:
        """Say in one line why this composition cannot run, or None."""
        if not 1 <= self.options.capacity <= 1 << 16:
            return f"scheme {self.name!r}: options.capacity must be 1 .. 65536"
        if self.shadow in ("none", "nested"):
            if (self.detect, self.propagate, self.apply) != ("none", "none", "none"):
                return f"scheme {self.name!r}: without a shadow the other policies must be 'none'"
            return None
        if self.detect == "none" or self.propagate == "none" or self.apply == "none":
            return f"scheme {self.name!r}: shadow tables need detect, propagate and apply"
        if self.options.shadow_pages < 64:
            return f"scheme {self.name!r}: options.shadow_pages must be at least 64"
        return self._option_problem()

    def _option_problem(self) -> str | None:
        for name, low, high in (
            ("flood", 0, 1 << 30), ("unsync", 2, 1 << 30), ("prefetch", 0, 1024),
            ("root_cache", 0, 1 << 30),
        ):  # fmt: skip
            value = getattr(self.options, name)
            if value is not None and not low <= value <= high:
                return f"scheme {self.name!r}: options.{name} must be {low} .. {high}"
        return None


NATIVE = Scheme(name="native", about="no monitor: the hardware walks the guest's own tables")
SHOOTDOWN = Scheme(
    name="shootdown",
    detect="write-trace",
    propagate="shootdown",
    apply="invalidate",
    shadow="per-cpu",
    about="every traced store is brought into every shadow at once (A40 ¶91)",
)
PATCH = Scheme(
    name="patch",
    detect="write-trace",
    propagate="patch",
    apply="update",
    shadow="per-cpu",
    about="traced stores are posted to patch channels, applied at coherency events (A40 Figs 8-12)",
)

PATCH_FLOOD = Scheme(
    name="patch-flood",
    detect="write-trace",
    propagate="patch",
    apply="update",
    shadow="per-cpu",
    options=SchemeOptions(flood=16),
    about="patch, and a table stored to 16 times without a fill gives its trace and shadows up",
)
OUT_OF_SYNC = Scheme(
    name="out-of-sync",
    detect="out-of-sync",
    propagate="shootdown",
    apply="update",
    shadow="per-cpu",
    about="leaf tables are written freely and compared at coherency events (Linux KVM, Xen)",
)

NESTED = Scheme(
    name="nested",
    shadow="nested",
    about="the hardware walks guest tables through a second-level table: no exits on their changes",
)

PRESETS = {
    scheme.name: scheme for scheme in (NATIVE, SHOOTDOWN, PATCH, PATCH_FLOOD, OUT_OF_SYNC, NESTED)
}
