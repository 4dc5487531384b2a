"""The file of TLB litmus tests: a JSON list; addresses, register values and entries as hex text.

Everything a file says is checked here, once, so that what runs a test need not doubt it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from penumbra.guest.litmus.barriers import Step, deadlock
from penumbra.hw.formats import CR0_PE, CR0_PG, CR4_PAE

Outcome: TypeAlias = tuple[str, ...]
MAX_CPUS = 16
_LIMIT = 1 << 32


class LitmusError(ValueError):
    """A file that is no list of litmus tests; the text says where and why."""

    def __init__(self, file: str, place: str, cause: str) -> None:
        super().__init__(f"{file}: {place}: {cause}")
        self.file, self.place, self.cause = file, place, cause


class Hex(int):
    """A 32-bit number that the file writes as hex text."""


class _Operation(msgspec.Struct, frozen=True, tag_field="op"):
    pass


class Read(_Operation, frozen=True, tag="read"):
    """Read 4 bytes at a linear address; the result is the value or the fault."""

    la: Hex
    cpl: int
    name: str = msgspec.field(default="", name="as")


class Write(_Operation, frozen=True, tag="write"):
    """Write 4 bytes at a linear address; the result is `ok` or the fault."""

    la: Hex
    val: Hex
    cpl: int
    name: str = msgspec.field(default="", name="as")


class SetEntry(_Operation, frozen=True, tag="set_entry"):
    """Store a dword at a physical address."""

    pa: Hex
    val: Hex


class GetEntry(_Operation, frozen=True, tag="get_entry"):
    """Load a dword from a physical address; the result is what `mask` leaves of it."""

    pa: Hex
    mask: Hex
    name: str = msgspec.field(default="", name="as")


class XchgEntry(_Operation, frozen=True, tag="xchg_entry"):
    """Exchange a dword at a physical address; the result is what `mask` leaves of the old one."""

    pa: Hex
    val: Hex
    mask: Hex
    name: str = msgspec.field(default="", name="as")


class Invlpg(_Operation, frozen=True, tag="invlpg"):
    """INVLPG of a linear address."""

    la: Hex


class MovCr0(_Operation, frozen=True, tag="mov_cr0"):
    """MOV CR0."""

    val: Hex


class MovCr3(_Operation, frozen=True, tag="mov_cr3"):
    """MOV CR3."""

    val: Hex


class MovCr4(_Operation, frozen=True, tag="mov_cr4"):
    """MOV CR4."""

    val: Hex


class Barrier(_Operation, frozen=True, tag="barrier"):
    """Wait for every CPU whose program has a barrier of this id."""

    id: str | int


Access: TypeAlias = Read | Write
EntryAccess: TypeAlias = SetEntry | GetEntry | XchgEntry
LitmusOperation: TypeAlias = Access | EntryAccess | Invlpg | MovCr0 | MovCr3 | MovCr4 | Barrier


class CpuStart(msgspec.Struct, frozen=True):
    """Control registers of one CPU at the start; its TLB is empty."""

    cr0: Hex
    cr3: Hex
    cr4: Hex


class Entry(msgspec.Struct, frozen=True):
    """One dword of memory at the start."""

    pa: Hex
    val: Hex


class Init(msgspec.Struct, frozen=True):
    """Registers and memory at the start."""

    cpus: tuple[CpuStart, ...]
    entries: tuple[Entry, ...]


class LitmusTest(msgspec.Struct, frozen=True):
    """One test.

    Attributes:
        observed: Registers whose values, in this order, are an outcome.
        allowed: Outcomes that the architecture permits.
        allowed_extra: Outcomes that it does not exclude either.
        allowed_nospec: Those of `allowed` that need no speculation; None: not said.
        sticky: Outcomes of a TLB from which nothing is ever evicted.
        flat: Outcomes without a TLB.
    """

    id: str
    init: Init
    programs: tuple[tuple[LitmusOperation, ...], ...]
    observed: tuple[str, ...]
    allowed: tuple[Outcome, ...]
    allowed_extra: tuple[Outcome, ...] = ()
    allowed_nospec: tuple[Outcome, ...] | None = None
    sticky: tuple[Outcome, ...] = ()
    flat: tuple[Outcome, ...] = ()
    smt_siblings: tuple[tuple[int, ...], ...] = ()
    category: str = ""
    title: str = ""
    sdm: str = ""
    rationale: str = ""

    @property
    def steps(self) -> tuple[tuple[Step, ...], ...]:
        """Per CPU its barriers by id, and None for each other operation."""
        return tuple(
            tuple(str(step.id) if isinstance(step, Barrier) else None for step in program)
            for program in self.programs
        )


def read_tests(path: Path) -> tuple[LitmusTest, ...]:
    """Read and check a whole file.

    Raises:
        LitmusError: It cannot be read, is no JSON, or says what no test can; nothing is returned.
    """
    file = str(path)
    try:
        data = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise LitmusError(file, "open", error.strerror or str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LitmusError(file, "JSON", str(error)) from None
    try:
        raw = msgspec.convert(data, tuple[LitmusTest, ...], dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise LitmusError(file, *_where(data, str(error))) from None
    if not raw:
        raise LitmusError(file, "whole file", "holds no test")
    tests = []
    for number, test in enumerate(raw):
        place = f"test {number} ({test.id!r})"
        for cause in _problems(test):
            raise LitmusError(file, place, cause)
        tests.append(_normal(test))
    return tuple(tests)


def _where(data: Any, text: str) -> tuple[str, str]:
    """Return place and cause of what is ill-typed; the decoder does not number operations."""
    cause, _, path = text.rpartition(" - at `$")
    if not cause:
        return "whole file", text
    path = path.rstrip("`")
    if ".programs[...][...]" not in path:
        return f"tests{path}" if path else "whole file", cause
    number = int(path[1 : path.index("]")])
    for cpu, program in enumerate(data[number]["programs"]):
        for at, operation in enumerate(program):
            try:
                msgspec.convert(operation, LitmusOperation, dec_hook=_decode)
            except msgspec.ValidationError as error:
                cause, _, field = str(error).rpartition(" - at `$")
                place = f"tests[{number}].programs[{cpu}][{at}]{field.rstrip('`')}"
                return place, cause or str(error)
    raise AssertionError(text)


def _decode(kind: type, value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("Expected hex text such as '0x1000'")
    try:
        number = int(value, 16)
    except ValueError:
        raise ValueError(f"{value[:40]!r} is no hex number") from None
    if not 0 <= number < _LIMIT:
        raise ValueError(f"{value[:40]} is no number of 32 bits")
    return kind(number)


def _problems(test: LitmusTest) -> Iterator[str]:
    """Yield what makes a well-typed test one that cannot run."""
    n = len(test.programs)
    if not 1 <= n <= MAX_CPUS:
        yield f"{n} programs: must be 1 to {MAX_CPUS}"
    if len(test.init.cpus) != n:
        yield f"{n} programs for {len(test.init.cpus)} CPUs"
    for cpu, start in enumerate(test.init.cpus):
        if problem := _bad_mode(start.cr0, start.cr4):
            yield f"init.cpus[{cpu}]: {problem}"
    for at, entry in enumerate(test.init.entries):
        if entry.pa & 3:
            yield f"init.entries[{at}]: {entry.pa:#x} is no address of a dword"
    for cpu, program in enumerate(test.programs):
        for at, operation in enumerate(program):
            if problem := _bad_operation(operation):
                yield f"programs[{cpu}][{at}]: {problem}"
    yield from _bad_siblings(test.smt_siblings, n)
    yield from _bad_outcomes(test)
    if stuck := deadlock(test.steps):
        yield f"no CPU can pass the barriers {', '.join(map(repr, stuck))}"


def _bad_mode(cr0: int, cr4: int) -> str:
    if cr0 & (CR0_PE | CR0_PG) != CR0_PE | CR0_PG:
        return f"paging is off in cr0 {cr0:#x}"
    return f"cr4 {cr4:#x} has PAE: the tests are of two-level paging" if cr4 & CR4_PAE else ""


def _bad_operation(operation: LitmusOperation) -> str:
    if isinstance(operation, Read | Write) and not 0 <= operation.cpl <= 3:
        return f"cpl {operation.cpl}: must be 0 to 3"
    if isinstance(operation, EntryAccess) and operation.pa & 3:
        return f"{operation.pa:#x} is no address of a dword"
    if isinstance(operation, MovCr0) and operation.val & (CR0_PG | CR0_PE) == CR0_PG:
        return f"cr0 {operation.val:#x} has PG without PE"
    if isinstance(operation, MovCr4):
        return _bad_mode(CR0_PE | CR0_PG, operation.val)
    return ""


def _bad_siblings(groups: tuple[tuple[int, ...], ...], n: int) -> Iterator[str]:
    named = [cpu for group in groups for cpu in group]
    if len(set(named)) < len(named) or not all(0 <= cpu < n for cpu in named):
        yield f"smt_siblings {list(map(list, groups))}: must name each of {n} CPUs at most once"


def _bad_outcomes(test: LitmusTest) -> Iterator[str]:
    named = {getattr(step, "name", "") for program in test.programs for step in program}
    for register in test.observed:
        if register not in named or not register:
            yield f"observed {register!r}: no operation sets it"
    if not test.allowed:
        yield "allowed: no outcome"
    for field in ("allowed", "allowed_extra", "allowed_nospec", "sticky", "flat"):
        for outcome in getattr(test, field) or ():
            if len(outcome) != len(test.observed):
                yield f"{field}: {list(outcome)} is not a value per observed register"
            for value in outcome:
                if _value(value) is None:
                    yield f"{field}: {value!r} is neither hex, 'ok' nor 'PF:' and hex"


def _value(text: str) -> str | None:
    """Return a register's value in the one form that results have, or None."""
    if text == "ok":
        return text
    head, digits = ("PF:", text[3:]) if text.startswith("PF:") else ("", text)
    try:
        return f"{head}{int(digits, 16):#x}"
    except ValueError:
        return None


def _normal(test: LitmusTest) -> LitmusTest:
    """Return a checked test whose outcomes are spelt as results are."""

    def spelt(outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
        return tuple(tuple(_value(value) or "" for value in outcome) for outcome in outcomes)

    return msgspec.structs.replace(
        test,
        allowed=spelt(test.allowed),
        allowed_extra=spelt(test.allowed_extra),
        allowed_nospec=None if test.allowed_nospec is None else spelt(test.allowed_nospec),
        sticky=spelt(test.sticky),
        flat=spelt(test.flat),
    )
