"""What the oracle found, as values; and how a violation reads."""

from __future__ import annotations

import msgspec


class Allowed(msgspec.Struct, frozen=True):
    """A translation that the access might have used.

    Attributes:
        pfn: Machine frame, -1 if the guest frame has none.
        rights: `wux` (write, user, execute), a dash for each that is missing.
        entries: The values it is made of, from the root down.
        fresh: Whether the present tables say so; else some cache may still hold it.
    """

    gfn: int
    pfn: int
    rights: str
    accessed: bool
    dirty: bool
    entries: tuple[int, ...]
    fresh: bool


class Value(msgspec.Struct, frozen=True):
    """A value an entry has held.

    Attributes:
        start: Number of the store or link from which it held.
        end: Number of the store that ended it, None for the present value.
        closed: The event that then closed the window of the page at the VCPU; "" if none did.
    """

    value: int
    start: int
    end: int | None
    closed: str


class EntryHistory(msgspec.Struct, frozen=True):
    """One entry on the way to the address; `gpa` is where the guest keeps it, -1 in a register."""

    name: str
    gpa: int
    values: tuple[Value, ...]


class Violation(msgspec.Struct, frozen=True):
    """An access or a fault that nothing in the allowed set explains.

    Attributes:
        seq: The oracle's time: number of stores, events, grants and faults before it.
        access: `read`, `write` or `fetch`, or `page fault on a ...`.
        mode: `user` or `supervisor`, with CR0.WP as it was.
        used_pfn: Machine frame used, None for a fault.
        used_gfns: Guest frames that lie in it.
        error: Error code delivered, None for an access.
    """

    seq: int
    vcpu: int
    gva: int
    access: str
    mode: str
    problem: str
    used_pfn: int | None
    used_gfns: tuple[int, ...]
    error: int | None
    allowed: tuple[Allowed, ...]
    history: tuple[EntryHistory, ...]

    def explain(self) -> str:
        """Return the violation as text of a few lines, the same for the same run."""
        lines = [
            f"#{self.seq} VCPU {self.vcpu}: {self.access} at {self.gva:#x}, {self.mode}",
            f"  {self.problem}",
            f"  {self._used()}",
        ]
        lines += [f"  allowed: {_allowed_text(one)}" for one in self.allowed]
        if not self.allowed:
            lines.append("  allowed: no translation")
        for entry in self.history:
            place = f"at gpa {entry.gpa:#x}" if entry.gpa >= 0 else "in its register"
            lines.append(f"  {entry.name} {place}")
            lines += [f"    {_value_text(value)}" for value in entry.values]
        return "\n".join(lines)

    def _used(self) -> str:
        if self.used_pfn is None:
            return f"delivered: error code {self.error:#x}"
        guests = ", ".join(f"{gfn:#x}" for gfn in self.used_gfns) or "of no guest frame"
        return f"used: machine frame {self.used_pfn:#x}, guest frame {guests}"


class Hazard(msgspec.Struct, frozen=True):
    """Uses, by one VCPU, of a translation that the guest OS had revoked: legal, and its mistake.

    Attributes:
        kind: What the guest's flush was: `missing`, `late` or `wrong range`.
        seq: The oracle's time of the first use; `n_uses` in all.
        gva: Of the first use, cut to the translated bits.
        gfn: Guest frame used.
        entry, gpa: The entry that was changed, -1 in a register; `value`: what it had held.
        store: Number of the store that changed it.
        by: The VCPU that stored; None if it is not known.
        why: How the guest had gone on as if the translation were no more.
        flush: What became of the flush.
    """

    kind: str
    seq: int
    vcpu: int
    gva: int
    access: str
    mode: str
    n_uses: int
    gfn: int
    entry: str
    gpa: int
    value: int
    store: int
    by: int | None
    why: str
    flush: str

    def explain(self) -> str:
        """Return the hazard as text of a few lines, the same for the same run."""
        place = f"at gpa {self.gpa:#x}" if self.gpa >= 0 else "in its register"
        by = (
            "a store of nobody known"
            if self.by is None
            else f"store #{self.store} of VCPU {self.by}"
        )
        times = f", {self.n_uses} times in all" if self.n_uses > 1 else ""
        return "\n".join(
            (
                f"hazard: {self.kind} flush: {self.entry} {place} held {self.value:#x} until {by}",
                (
                    f"  #{self.seq} VCPU {self.vcpu} used the old translation, guest frame"
                    f" {self.gfn:#x}: {self.access} at {self.gva:#x}, {self.mode}{times}"
                ),
                f"  {self.why}",
                f"  {self.flush}",
            )
        )


class Verdict(msgspec.Struct, frozen=True):
    """The oracle's count of a run.

    Attributes:
        n_checked: Single accesses and runs; the sum of `n_fresh`, `n_stale` and the violating ones.
        n_references: The same, each run counted as the references it stands for.
        n_stale: Legal uses of an older translation.
        n_faults: Faults delivered; `n_spurious` of them are explained by a cache only.
        violations: The first of `n_violations`.
        hazards: The first mistakes of the guest OS; `n_hazards` accesses or runs came of all. The
            guest's mistakes are no incoherence.
    """

    coherent: bool
    n_checked: int
    n_references: int
    n_fresh: int
    n_stale: int
    n_faults: int
    n_spurious: int
    n_violations: int
    violations: tuple[Violation, ...]
    n_hazards: int = 0
    hazards: tuple[Hazard, ...] = ()

    def explain(self) -> str:
        """Return the verdict, the violations and the hazards described, as text."""
        head = (
            f"{'coherent' if self.coherent else 'NOT COHERENT'}: {self.n_references} references "
            f"in {self.n_checked} checks, {self.n_stale} by older translations; "
            f"{self.n_faults} faults, {self.n_spurious} spurious; {self.n_violations} violations"
        )
        found = [one.explain() for one in self.violations] + [one.explain() for one in self.hazards]
        return "\n".join([head, *found])


def _allowed_text(one: Allowed) -> str:
    pfn = "none" if one.pfn < 0 else f"{one.pfn:#x}"
    bits = f"{'A' if one.accessed else '-'}{'D' if one.dirty else '-'}"
    entries = " ".join(f"{value:#x}" for value in one.entries)
    origin = "present tables" if one.fresh else "may still be cached"
    return (
        f"machine frame {pfn}, guest frame {one.gfn:#x} {one.rights} {bits} ({origin}: {entries})"
    )


def _value_text(value: Value) -> str:
    if value.end is None:
        return f"{value.value:#x} from #{value.start} until now"
    closed = f"closed by {value.closed}" if value.closed else "no event has closed it"
    return f"{value.value:#x} from #{value.start} to #{value.end}, {closed}"
