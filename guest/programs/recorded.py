"""A recording as a program: blocks of its access streams, and its system calls between them.

Everything is mapped where it was mapped when it was recorded, so the references need no change.
Each recorded process is an entry of the program: a child that was recorded from its fork starts
there at once, one that was recorded from an exec does the exec first.
"""

from __future__ import annotations

from dataclasses import dataclass

from penumbra.guest.programs.program import Image
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.traces.recording import Call, RecordedProcess, Recording
from penumbra.hw.operations import Block, Syscall

MAP_FIXED = 0x10
MREMAP_FIXED = 2
_EXEC_FIRST = -1


class ReplayError(Exception):
    """A replayed call did not do what the recorded one did."""


@dataclass(frozen=True)
class RecordedProgram:
    """Replays a recording.

    Attributes:
        first_stream: Machine's number of process 0's stream; process n's is `first_stream + n`.
    """

    recording: Recording
    name: str = "recording"
    first_stream: int = 0

    @property
    def peak_pages(self) -> int:
        return self.recording.peak_pages

    def image(self, number: int) -> Image:
        return Image(number, self.recording.processes[number].image, underlies=True)

    def used_ranges(self) -> list[tuple[int, int]]:
        """Return every page range that a process touches or maps."""
        ranges = []
        for process in self.recording.processes:
            ranges += [(region.first_vpn, region.n_pages) for region in process.image]
            for call in process.calls:
                if call.name in ("mmap", "mremap"):
                    length = call.args[2] if call.name == "mremap" else call.args[1]
                    ranges.append((call.result >> 12, -(-length // 4096)))
                elif call.name == "brk":
                    ranges.append((call.result >> 12, 1))
            ranges += [(vpn, 1) for vpn in process.stream.pages.tolist()]
        return ranges

    def start(self, entry: int, args: tuple[int, ...]) -> GuestCoroutine:
        """Return the replay of process `entry` from its call number `args[0]` on.

        Number -1 stands for the exec before the first call.
        """
        return self._replay(self.recording.processes[entry], args[0] if args else 0)

    async def _replay(self, process: RecordedProcess, number: int) -> None:
        if number == _EXEC_FIRST:
            await Syscall("exec", (process.index, process.index, 0))
        stream = self.first_stream + process.index
        children: dict[int, int] = {}
        calls = process.calls
        # After an exec in mid-stream the replay starts behind that call.
        position = calls[number - 1].at if number else 0
        for next_number, call in enumerate(calls[number:], number + 1):
            if call.at > position:
                await Block(stream, position, call.at)
                position = call.at
            if call.name == "fork":
                children[call.args[0]] = await self._fork(call.args[0])
            elif call.name == "wait":
                await Syscall("wait", (children.get(call.args[0], -1),))
            elif call.name == "exec":
                await Syscall("exec", (process.index, process.index, next_number))
            else:
                await _call(call)
        if len(process.stream.runs) > position:
            await Block(stream, position, len(process.stream.runs))

    async def _fork(self, child: int) -> int:
        number = _EXEC_FIRST if self.recording.processes[child].starts_at_exec else 0
        pid: int = await Syscall("fork", (child, number))
        return pid


async def _call(call: Call) -> None:
    """Repeat a recorded call so that it has the recorded effect.

    Raises:
        ReplayError: Its result is another.
    """
    args, wanted = call.args, 0
    if call.name == "mmap":
        args = (call.result, args[1], args[2], args[3] | MAP_FIXED, args[4], args[5])
        wanted = call.result
    elif call.name == "mremap":
        args = (*args[:3], args[3] | MREMAP_FIXED, call.result)
        wanted = call.result
    elif call.name == "brk":
        args, wanted = (call.result,), call.result
    elif call.name == "other":
        args = ()
    result = await Syscall(call.name, args)
    if result != wanted:
        raise ReplayError(f"{call.name}{call.args} gave {result:#x}, recorded {wanted:#x}")
