"""A coherence scheme is a value: four policies and their options.

*Detect*: how a change of a guest page table is learnt: by a write trace, or because the guest says
so. *Propagate*: how the other CPUs' sub-VMMs learn it. *Apply*: what becomes of the derived entry.
*Shadow*: whose derived tables there are. `native` has the same shape with all of them empty. Adding
a scheme touches no driver.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from penumbra.actors.vmm.buffer_faults import buffer_fault_named
from penumbra.actors.vmm.vtlb.errata import unknown

Detect = Literal["none", "write-trace", "write-buffer", "out-of-sync", "announced"]
Propagate = Literal["none", "shootdown", "patch"]
Apply = Literal["none", "update", "invalidate"]
Shadow = Literal["none", "per-cpu", "shared", "per-privilege", "nested"]
ChannelKind = Literal["pair", "pair-locked", "shared", "per-producer", "per-consumer"]
InUseForm = Literal["field", "base", "outside"]
Coalesce = Literal["update", "void", "never"]
Postponed = Literal["leave", "store", "never"]
Overflow = Literal["shootdown", "lost", "wait"]
Stale = Literal["derive", "invalidate"]


class WriteBufferOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the detection by guest write buffers (GWB).

    Attributes:
        records: Records a CPU's buffer holds.
        overflow: What a full one does: stop the CPU before the store ("exit"), or note a loss, for
            which every shadow is dropped at its VCPU's next event ("lost").
        marks: Which shadow entries are marked: those that map guest tables, or all writable ones.
        combines: A store next to the last record's shares its record.
        fault: Switches joined by `+` (`penumbra list faults`).
    """

    records: int = 64
    overflow: Literal["exit", "lost"] = "exit"
    marks: Literal["tables", "writable"] = "tables"
    combines: bool = True
    fault: str = ""


class SchemeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the policies.

    Attributes:
        capacity: Patches per channel of the matrix (A40 Fig. 9).
        tell_all: Leave out step 832: every consumer is told of every change.
        shadow_pages: Shadow page-table pages per VCPU before the least recently used is dropped.
        flood: Traced stores to one guest table without a fill through it, after which its trace and
            its shadows are dropped; 0 never.
        order: Name of the patch channel's step order (`penumbra list faults`).
        channels: Who shares a patch channel, with or without a lock (A40 ¶58, ¶127).
        in_use: Where a patch of a `pair` channel says that it is in use: in a field of its own, in
            its base (stored last; 842 is then part of 840), or outside the channel (¶101).
        derived: Whether a patch carries a derived value (394D, ¶99).
        coalesce: What 837 does to a patch that waits for the same entry: update its derived value,
            void it, or nothing, since 836 is left out.
        postpone: What becomes of a patch that an event does not cover (868): left in its channel,
            its key moved to a private store (870), or never postponed, for 868 and 870 are left
            out.
        stale: What `update` does with a patch whose derived value is not valid any more: derive
            again from the entry (A40c 51), or invalidate (A40c 50).
        overflow: What a full channel costs: a shootdown of the entry (844), a mark that makes its
            consumer drop everything at its next event, or a wait until the consumers have taken
            what is in the channel (¶128).
        buffer: The guest write buffers, where `detect` is "write-buffer".
        fill: Virtual TLB: filled by faults alone, or all anew at each event (VTLB Figs 10A, 10B).
        drop: Virtual TLB: what INVLPG drops, entries tied to the address or all (VTLBc 5, 6).
        levels: Virtual TLB: levels built per fault, all of a path or one as printed (Fig. 7B).
        sharing: Virtual TLB: a pair of hierarchies per VCPU, or per root and mode within the VM.
        working_set: Virtual TLB: roots whose hierarchies a VCPU keeps for when they come back; what
            it finds there is compared with the guest's tables. 0: a root load empties all.
        errata: Virtual TLB: errors of the text to run as printed (`docs/errata.md`, ET1 to ET15).
        unsync: Leaf tables that may be out of sync at a time (detect "out-of-sync"); a store that
            crosses from one to another needs two.
        prefetch: Leaf entries of one guest table derived with each fill: the aligned group that the
            filled one is of; 0 or 1 it alone. Virtual TLB: used entries loaded on its either side.
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
    channels: ChannelKind = "pair"
    in_use: InUseForm = "field"
    derived: bool = True
    coalesce: Coalesce = "update"
    postpone: Postponed = "leave"
    stale: Stale = "derive"
    overflow: Overflow = "shootdown"
    buffer: WriteBufferOptions = WriteBufferOptions()
    fill: Literal["lazy", "eager"] = "lazy"
    drop: Literal["tied", "all"] = "tied"
    levels: Literal["all", "one"] = "all"
    sharing: Literal["vcpu", "vm"] = "vcpu"
    working_set: int = 0
    errata: tuple[str, ...] = ()
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
        if self.options.channels != "pair" and self.options.in_use != "field":
            return f"scheme {self.name!r}: options.in_use is a choice of 'pair' channels alone"
        if self.detect == "announced":
            if (self.propagate, self.apply, self.shadow) != ("patch", "invalidate", "none"):
                return f"scheme {self.name!r}: what is announced is patched into TLBs, no shadow"
            if self.options.overflow == "wait":
                return f"scheme {self.name!r}: without a monitor nobody can be waited for"
            return None
        if self.shadow in ("none", "nested"):
            if (self.detect, self.propagate, self.apply) != ("none", "none", "none"):
                return f"scheme {self.name!r}: without a shadow the other policies must be 'none'"
            return None
        if not 1 <= self.options.buffer.records <= 1 << 16:
            return f"scheme {self.name!r}: options.buffer.records must be 1 .. 65536"
        try:
            buffer_fault_named(self.options.buffer.fault)
        except ValueError as error:
            return f"scheme {self.name!r}: options.buffer.fault: {error}"
        if self.options.shadow_pages < 64:
            return f"scheme {self.name!r}: options.shadow_pages must be at least 64"
        problem = self._option_problem()
        if problem or self.shadow == "per-privilege":
            return problem or self._virtual_tlb_problem()
        if self.detect == "none" or self.propagate == "none" or self.apply == "none":
            return f"scheme {self.name!r}: shadow tables need detect, propagate and apply"
        return None

    def _option_problem(self) -> str | None:
        options = self.options
        for name, low, high in (
            ("flood", 0, 1 << 30), ("unsync", 2, 1 << 30), ("prefetch", 0, 1024),
            ("root_cache", 0, 1 << 30),
        ):  # fmt: skip
            value = getattr(options, name)
            if value is not None and not low <= value <= high:
                return f"scheme {self.name!r}: options.{name} must be {low} .. {high}"
        private = self.detect == "out-of-sync" or options.root_cache is not None
        if self.shadow == "shared" and (private or not options.share_roles):
            return (
                f"scheme {self.name!r}: what VCPUs share is kept by role, all of it, and in sync: "
                "not with detect 'out-of-sync', options.root_cache, options.share_roles false"
            )
        return None

    def machine_problem(self, tlb: str) -> str | None:
        """Say in one line why this composition cannot run on such a machine, or None."""
        if self.shadow == "nested" and tlb == "software":
            return f"scheme {self.name!r} is a walk of the hardware's: not with machine.tlb {tlb!r}"
        return None

    def _virtual_tlb_problem(self) -> str | None:
        options = self.options
        if (self.detect, self.propagate) != ("none", "none"):
            return f"scheme {self.name!r}: a virtual TLB traces nothing: detect, propagate 'none'"
        if self.apply != ("update" if options.fill == "eager" else "invalidate"):
            return f"scheme {self.name!r}: apply must be 'invalidate', with eager fill 'update'"
        if not 0 <= options.prefetch <= 1024:
            return f"scheme {self.name!r}: options.prefetch must be 0 .. 1024"
        if not 0 <= options.working_set <= 256:
            return f"scheme {self.name!r}: options.working_set must be 0 .. 256"
        if options.working_set and options.sharing != "vcpu":
            return f"scheme {self.name!r}: a working set is a VCPU's own: sharing must be 'vcpu'"
        name = unknown(options.errata)
        return name and f"scheme {self.name!r}: options.errata: no erratum {name!r}"


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
NATIVE_PATCH = Scheme(
    name="native-patch",
    detect="announced",
    propagate="patch",
    apply="invalidate",
    options=SchemeOptions(overflow="lost"),
    about="no monitor: the OS posts what it unmaps, each CPU drops it at its own event (A40 ¶59)",
)
PATCH_LOCKED = msgspec.structs.replace(
    PATCH,
    name="patch-locked",
    options=SchemeOptions(channels="pair-locked"),
    about="the same with a lock for each channel (A40 ¶58, ¶120)",
)
PATCH_SHARED = msgspec.structs.replace(
    PATCH,
    name="patch-shared",
    options=SchemeOptions(channels="shared", capacity=256),
    about="one channel with a lock for all producers and consumers (A40 ¶127)",
)
WRITE_BUFFER = Scheme(
    name="write-buffer",
    detect="write-buffer",
    propagate="patch",
    apply="update",
    shadow="per-cpu",
    about="the hardware logs stores to guest tables; events read every CPU's log (GWB)",
)
VTLB = Scheme(
    name="vtlb",
    apply="invalidate",
    shadow="per-privilege",
    about="a virtual TLB: nothing is traced, faults fill it, the guest's flushes drop from it",
)
VTLB_EAGER = Scheme(
    name="vtlb-eager",
    apply="update",
    shadow="per-privilege",
    options=SchemeOptions(fill="eager"),
    about="a virtual TLB filled with all the guest's tables say at each event (VTLB Fig. 10)",
)
VTLB_SMP = Scheme(
    name="vtlb-smp",
    apply="invalidate",
    shadow="per-privilege",
    options=SchemeOptions(working_set=16),
    about="a virtual TLB per CPU that keeps the hierarchies of roots it ran on and compares them",
)

PATCH_FLOOD = msgspec.structs.replace(
    PATCH,
    name="patch-flood",
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
    scheme.name: scheme
    for scheme in (
        NATIVE,
        NATIVE_PATCH,
        SHOOTDOWN,
        PATCH,
        PATCH_LOCKED,
        PATCH_SHARED,
        PATCH_FLOOD,
        VTLB,
        VTLB_EAGER,
        VTLB_SMP,
        WRITE_BUFFER,
        OUT_OF_SYNC,
        NESTED,
    )
}
