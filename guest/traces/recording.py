"""Recordings: what a group of real processes did to their memory.

Each process is a stream of page runs (`penumbra.hw.streams`) and a list of system calls, each with
its exact place between two runs. There is no order between processes but the one that calls imply:
a child starts at its parent's `fork`, a `wait` ends after that child's `exit`. Addresses are those
of the recorded run: a replay maps what was recorded where it was recorded.

Arguments of the modelled calls, addresses and lengths in bytes and page aligned:

    mmap      addr, len, prot, flags, file_id, page_offset   result: the address mapped
    munmap    addr, len
    mprotect  addr, len, prot
    mremap    old, old_len, new_len, flags                   result: the new address
    brk       addr (as asked, 0 asks for the present one)    result: the break now
    fork      child                                          result: child
    exec      (the program went on unrecorded)
    exit      code; 128 + n after signal n
    wait      child, or -1: any that no other wait names     result: as the argument
    other     number                                         result: 0 or -errno

`other` is any call without effect on memory, any that failed, and any that a signal broke off.
prot: 1 read, 2 write, 4 execute; flags: 1 shared, 2 private, 0x10 fixed, 0x20 anonymous. The
`file_id` numbers the recording's files by first use, -1 is none: equal ids are the same file, so a
shared page of it is the same page in every process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from penumbra.hw.streams import AccessStream

N_ARGS = {
    "mmap": 6, "munmap": 2, "mprotect": 3, "mremap": 4, "brk": 1,
    "fork": 1, "exec": 0, "exit": 1, "wait": 1, "other": 1,
}  # fmt: skip
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 0x10, 0x20
MAX_VPN = {32: 1 << 20, 64: 1 << 35}  # pages of a 32-bit address space, of the lower half of 2**48


@dataclass(frozen=True, slots=True)
class Call:
    """One system call.

    Attributes:
        at: Index of the run before which it happens; the number of runs when after the last.
        name: A key of `N_ARGS`.
        args: As the module's docstring says.
        result: As the module's docstring says; 0 where it says nothing.
    """

    at: int
    name: str
    args: tuple[int, ...] = ()
    result: int = 0


@dataclass(frozen=True, slots=True)
class Region:
    """Adjacent pages with equal rights (bits of `PROT_READ`, `PROT_WRITE`, `PROT_EXEC`)."""

    first_vpn: int
    n_pages: int
    prot: int


@dataclass(frozen=True)
class RecordedProcess:
    """One process of a recording.

    Attributes:
        index: Its number, in order of creation; 0 is the first.
        parent: Its parent's index, -1 for the first.
        starts_at_exec: Its own image is all it has; else it starts with a copy of its parent.
        stream: Its references; `salt` is `index + 1`.
        calls: Its system calls, in order.
        image: Pages it touches outside all that was mapped at that time: program, loader, stack;
            with those of its descendants that did not exec, as they can only have come from here.
            A replay lays it under all mappings: a page of it is there wherever nothing else is.
    """

    index: int
    parent: int
    starts_at_exec: bool
    stream: AccessStream
    calls: tuple[Call, ...]
    image: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Recording:
    """Some processes of 32 or 64 bits and where they came from.

    Invariant: `problem()` is None. Above all: indices are dense and a parent's is lower than its
    child's; every process but the first has exactly one `fork` call, in its parent; calls are in
    order and lie within the stream.

    Attributes:
        processes: By index.
        bits: 32 or 64.
        provenance: What was recorded, by which command and tool.
        peak_pages: Upper bound of the pages resident at once, however processes are scheduled.
            A fork that copies on write stays below it; page tables are not counted.
    """

    processes: tuple[RecordedProcess, ...]
    bits: int
    provenance: str
    peak_pages: int = field(default=0, compare=False)

    @property
    def n_processes(self) -> int:
        return len(self.processes)

    @property
    def n_references(self) -> int:
        return sum(process.stream.n_references for process in self.processes)

    @property
    def n_runs(self) -> int:
        return sum(len(process.stream.runs) for process in self.processes)

    @property
    def n_pages(self) -> int:
        """Pages touched, counted per process."""
        return sum(len(process.stream.pages) for process in self.processes)

    @property
    def calls_by_name(self) -> dict[str, int]:
        counts = Counter(call.name for process in self.processes for call in process.calls)
        return {name: counts[name] for name in N_ARGS if counts[name]}

    def check(self) -> None:
        problem = self.problem()
        assert problem is None, problem

    def problem(self) -> str | None:
        """Name the first broken invariant, or None: for readers of files that others wrote."""
        if self.bits not in MAX_VPN:
            return f"{self.bits} bits"
        if not self.processes:
            return "no process"
        forked: list[int] = []
        for index, process in enumerate(self.processes):
            if process.index != index or not (process.parent < index):
                return f"process {index} is numbered {process.index} with parent {process.parent}"
            if (process.parent < 0) != (index == 0) or process.parent < -1:
                return f"process {index} has parent {process.parent}"
            problem = _stream_problem(process, self.bits) or _calls_problem(process)
            if problem:
                return f"process {index}: {problem}"
            forks = [call.args[0] for call in process.calls if call.name == "fork"]
            waits = [call.args[0] for call in process.calls if call.name == "wait"]
            for child in (*forks, *(child for child in waits if child != -1)):
                if not 0 <= child < len(self.processes) or self.processes[child].parent != index:
                    return f"process {index} forks or awaits {child}, which is not its child"
            forked += forks
        if sorted(forked) != list(range(1, len(self.processes))):
            return "not every process but the first is forked exactly once"
        return None


def _stream_problem(process: RecordedProcess, bits: int) -> str | None:
    stream = process.stream
    if stream.salt != process.index + 1:
        return f"salt {stream.salt}"
    if len(stream.pages) and (stream.pages.min() < 0 or stream.pages.max() >= MAX_VPN[bits]):
        return f"a page outside a {bits}-bit address space"
    return stream.problem()


def _calls_problem(process: RecordedProcess) -> str | None:
    at = 0
    for number, call in enumerate(process.calls):
        if call.name not in N_ARGS:
            return f"call {number} is named {call.name!r}"
        if len(call.args) != N_ARGS[call.name]:
            return f"call {number}, {call.name}, has {len(call.args)} arguments"
        if not at <= call.at <= len(process.stream.runs):
            return f"call {number}, {call.name}, is out of place at run {call.at}"
        at = call.at
        if not all(-(1 << 63) <= value < 1 << 64 for value in (*call.args, call.result)):
            return f"call {number}, {call.name}, has a number of more than 64 bits"
        problem = _ranges_problem(call)
        if problem:
            return f"call {number}, {call.name}: {problem}"
    return None


_LENGTHS = {"mmap": (1,), "munmap": (1,), "mprotect": (1,), "mremap": (1, 2)}
_ADDRESSES = {"munmap": (0,), "mprotect": (0,), "mremap": (0,)}
_RESULTS = ("mmap", "mremap")


def _ranges_problem(call: Call) -> str | None:
    limit = MAX_VPN[64] << 12
    lengths = [call.args[i] for i in _LENGTHS.get(call.name, ())]
    addresses = [call.args[i] for i in _ADDRESSES.get(call.name, ())]
    if call.name in _RESULTS:
        addresses.append(call.result)
    for value in (*lengths, *addresses):
        if value % 4096 or not 0 <= value <= limit:
            return f"{value:#x} is no page-aligned user address or length"
    if call.name == "mmap" and not (
        0 <= call.args[2] <= 7 and call.args[4] >= -1 and call.args[5] >= 0
    ):
        return f"arguments {call.args}"
    if call.name == "brk" and not 0 <= call.result <= limit:
        return f"a break of {call.result:#x}"
    return None
