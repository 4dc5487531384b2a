"""TLB litmus tests: what the oracle accepts is what the architecture allows, no more and no less.

Every interleaving that the barriers permit is tried, and in each access every result there could
be. An outcome counts if the oracle finds nothing wrong on the way to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .rig import A, D, Rig

TESTS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "litmus_sample.json").read_text(encoding="utf-8")
)
FAULTS = (0, 1, 2, 3, 4, 5, 6, 7)


def number(text: str) -> int:
    return int(text, 16)


class Run:
    """One execution of a litmus test, as far as it has come."""

    def __init__(self, test: dict[str, Any]) -> None:
        self.test = test
        self.frames = sorted(set(frames_named(test)))
        self.rig = Rig("ia32", len(test["programs"]), n_frames=max(self.frames) + 2 & ~1)
        for entry in test["init"]["entries"]:
            self.rig.hardware(number(entry["pa"]), number(entry["val"]))
        self.cr3 = []
        for vcpu, cpu in enumerate(test["init"]["cpus"]):
            cr0, cr3, cr4 = (number(cpu[name]) for name in ("cr0", "cr3", "cr4"))
            self.rig.oracle.registers(vcpu, cr0, cr3, cr4, 0)
            self.cr3.append(cr3)
        self.at = [0] * len(test["programs"])
        self.seen: dict[str, str] = {}

    def ready(self) -> list[int]:
        """Return the VCPUs that have an operation to do; pass the barriers all have reached."""
        while True:
            heads = [
                program[at] if at < len(program) else None
                for program, at in zip(self.test["programs"], self.at, strict=True)
            ]
            for head in heads:
                if head is not None and head["op"] == "barrier" and self._all_at(heads, head):
                    self.at = [
                        at + (other == head) for at, other in zip(self.at, heads, strict=True)
                    ]
                    break
            else:
                return [
                    vcpu
                    for vcpu, head in enumerate(heads)
                    if head is not None and head["op"] != "barrier"
                ]

    def _all_at(self, heads: list[dict[str, Any] | None], barrier: dict[str, Any]) -> bool:
        return all(
            head == barrier or barrier not in program
            for head, program in zip(heads, self.test["programs"], strict=True)
        )

    def results(self, vcpu: int) -> list[int]:
        """Return the choices for a VCPU's next operation: frames, or ~error for faults."""
        operation = self.test["programs"][vcpu][self.at[vcpu]]
        if operation["op"] in ("read", "write"):
            return [*self.frames, *(~error for error in FAULTS)]
        return [0]

    def do(self, vcpu: int, result: int) -> bool:
        """Do a VCPU's next operation with a result; tell whether the oracle accepts it."""
        operation = self.test["programs"][vcpu][self.at[vcpu]]
        self.at[vcpu] += 1
        name = operation["op"]
        if name in ("read", "write"):
            return self._access(vcpu, operation, result)
        if name == "set_entry":
            self.rig.store(number(operation["pa"]), number(operation["val"]))
        elif name == "get_entry":
            value = self.rig.peek(number(operation["pa"])) & number(operation["mask"])
            self.seen[operation["as"]] = hex(value)
        elif name == "invlpg":
            self.rig.oracle.event(vcpu, "INVLPG", number(operation["la"]))
        else:
            value = number(operation["val"])
            self.rig.oracle.event(vcpu, name.removeprefix("mov_").upper(), value)
            if name == "mov_cr3":
                self.cr3[vcpu] = value
        return True

    def _access(self, vcpu: int, operation: dict[str, Any], result: int) -> bool:
        gva, user = number(operation["la"]), operation["cpl"] == 3
        write = operation["op"] == "write"
        if result < 0:
            self.seen[operation["as"]] = f"PF:{~result:#x}"
            return (
                bool(~result & 2) == write
                and self.rig.faults(gva, ~result, user=user, vcpu=vcpu) != "wrong"
            )
        self._set_bits(vcpu, gva, result, write=write)
        self.seen[operation["as"]] = "ok" if write else hex(result << 12 | gva & 0xFFF)
        return self.rig.uses(gva, result, int(write), user=user, vcpu=vcpu) != "wrong"

    def _set_bits(self, vcpu: int, gva: int, frame: int, *, write: bool) -> None:
        """Set A and D as a walk of the present tables does, if it leads to the frame used."""
        pde_at = (self.cr3[vcpu] & ~0xFFF) + 4 * (gva >> 22)
        pde = self.rig.peek(pde_at)
        if pde & 0x81 == 0x81 and (pde >> 22 << 22 | gva & 0x3FFFFF) >> 12 == frame:
            self.rig.hardware(pde_at, pde | A | D * write)
        if pde & 0x81 != 1:
            return
        pte_at = (pde & ~0xFFF) + 4 * (gva >> 12 & 1023)
        pte = self.rig.peek(pte_at)
        if pte & 1 and pte >> 12 == frame:
            self.rig.hardware(pde_at, pde | A)
            self.rig.hardware(pte_at, pte | A | D * write)


def frames_named(test: dict[str, Any]) -> Iterator[int]:
    """Yield the frames of all tables and pages a test speaks of, and of the accesses in them."""
    values = [entry["val"] for entry in test["init"]["entries"]]
    values += [entry["pa"] for entry in test["init"]["entries"]]
    operations = [operation for program in test["programs"] for operation in program]
    values += [operation["val"] for operation in operations if operation["op"] == "set_entry"]
    for value in values:
        yield number(value) >> 12
    for operation in operations:
        if "la" in operation:
            inside = (number(operation["la"]) & 0x3FFFFF) >> 12
            yield from (number(value) >> 22 << 10 | inside for value in values)


def outcomes(test: dict[str, Any]) -> set[tuple[str, ...]]:
    """Return all outcomes that the oracle accepts."""
    found = set()
    unfinished: list[tuple[tuple[int, int], ...]] = [()]
    while unfinished:
        choices = unfinished.pop()
        run = Run(test)
        if not all(run.ready() and run.do(*choice) for choice in choices):
            continue
        ready = run.ready()
        if not ready:
            found.add(tuple(run.seen[name] for name in test["observed"]))
        for vcpu in ready:
            unfinished += [(*choices, (vcpu, result)) for result in run.results(vcpu)]
    return found


@pytest.mark.shows("C1")
@pytest.mark.parametrize("test", TESTS, ids=[test["id"] for test in TESTS])
def test_the_oracle_accepts_exactly_the_outcomes_that_the_architecture_allows(
    test: dict[str, Any],
) -> None:
    assert outcomes(test) == {tuple(outcome) for outcome in test["allowed"]}
