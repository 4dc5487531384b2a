"""System calls as printed to the modelled calls of a recording.

Kept is what changes an address space or the tree of processes; all else becomes `other`. Files get
their number at their first mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from penumbra.guest.traces.descriptors import Descriptors, signed_fd
from penumbra.guest.traces.recording import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    Call,
)
from penumbra.guest.traces.syscalls import CallReader, RawCall

ANY_CHILD = -1
EINTR = 4
_NO_FILE = -1
_CLONE_THREAD = 0x10000
_WNOHANG, _WNOWAIT = 1, 0x1000000
_P_PID = 1
_SHM_RDONLY, _SHM_EXEC = 0o10000, 0o100000


@dataclass
class World:
    """What the processes of one recording share.

    Attributes:
        index: Process index by pid.
        files: Number by identity, in order of first mapping.
        segments: Size of each System V shared-memory segment.
    """

    index: dict[int, int]
    files: dict[Hashable, int] = field(default_factory=dict)
    segments: dict[int, int] = field(default_factory=dict)


class CallTranslator:
    """Turns one process's raw calls into modelled ones.

    Attributes:
        forked: Descriptors at the fork, by child index; filled as forks are met.
    """

    def __init__(
        self, log: CallReader, world: World, descriptors: Descriptors, children: set[int]
    ) -> None:
        self._log, self._world, self._fds = log, world, descriptors
        self._children = children
        self._shared_at: dict[int, int] = {}
        self._returned = True  # the call at hand did, even if its result is not in the log
        self.forked: dict[int, Descriptors] = {}

    def translate(self, places: list[int], first: list[Call]) -> tuple[Call, ...]:
        """Translate all calls; `places` are their run indices, `first` what precedes them."""
        calls = list(first)
        numbers = [0] * len(first) + [raw.number for raw in self._log.calls]
        for index, (raw, at) in enumerate(zip(self._log.calls, places, strict=True)):
            self._returned = not raw.is_blocked or self._log.broke_off_at_its_end(index)
            try:
                calls.append(self._translate(raw, at))
            except ValueError as error:
                raise self._log.error(raw.line, f"cannot read {raw.name}: {error}") from error
        return _resolve_waits(calls, numbers)

    def _translate(self, raw: RawCall, at: int) -> Call:
        handler = _HANDLERS.get(raw.name)
        if handler is None:
            self._fds.follow(raw)
        modelled = handler(self, raw) if handler else None
        if modelled is not None:
            name, args, result = modelled
            return Call(at, name, args, result)
        return Call(at, "other", (raw.number,), _other_result(raw))

    # Each handler returns (name, args, result), or None for a call that becomes `other`.

    def _mmap(self, raw: RawCall) -> Modelled:
        if not raw.succeeded or raw.value is None:
            return None
        addr, length, prot, flags, fd, offset = raw.number_args(6)
        page_offset = offset if raw.name == "mmap2" else offset >> 12
        kept = flags & (MAP_FIXED | MAP_ANONYMOUS)
        kept |= MAP_SHARED if flags & MAP_SHARED else MAP_PRIVATE  # 3 is a validated shared one
        file_id = _NO_FILE
        if flags & MAP_ANONYMOUS:
            page_offset = 0
        else:
            file_id = self._number(self._fds.identity(signed_fd(fd)))
        args = (addr & ~0xFFF, _pages(length), prot & 7, kept, file_id, page_offset)
        return "mmap", args, raw.value

    def _munmap(self, raw: RawCall) -> Modelled:
        if not raw.succeeded:
            return None
        addr, length = raw.number_args(2)
        return "munmap", (addr, _pages(length)), 0

    def _mprotect(self, raw: RawCall) -> Modelled:
        if not raw.succeeded:
            return None
        addr, length, prot = raw.number_args(3)
        return "mprotect", (addr, _pages(length), prot & 7), 0

    def _mremap(self, raw: RawCall) -> Modelled:
        if not raw.succeeded or raw.value is None:
            return None
        old, old_length, new_length, flags = raw.number_args(4)
        return "mremap", (old, _pages(old_length), _pages(new_length), flags & 7), raw.value

    def _brk(self, raw: RawCall) -> Modelled:
        if not raw.succeeded or raw.value is None:
            return None
        (addr,) = raw.number_args(1)
        return "brk", (addr,), raw.value

    def _fork(self, raw: RawCall) -> Modelled:
        pid = raw.created_pid
        if pid is None:
            if raw.name == "clone" and raw.succeeded and _clone_flags(raw) & _CLONE_THREAD:
                raise self._log.error(raw.line, "starts a thread: threads sharing an address "
                                                "space cannot be replayed")  # fmt: skip
            return None
        child = self._world.index[pid]
        self.forked[child] = self._fds.fork(child)
        return "fork", (child,), child

    def _exec(self, raw: RawCall) -> Modelled:
        return None if raw.failed else ("exec", (), 0)

    def _exit(self, raw: RawCall) -> Modelled:
        (code,) = raw.number_args(1)
        return "exit", (code & 0xFF,), 0

    def _wait(self, raw: RawCall) -> Modelled:
        if raw.succeeded and raw.value:
            return self._waited(raw.value)
        pid, _, options = raw.number_args(3)
        if raw.value is not None or not self._returned or options & _WNOHANG:
            return None
        return self._waited(signed_fd(pid))

    def _waitid(self, raw: RawCall) -> Modelled:
        id_type, pid, _, options = raw.number_args(4)
        if raw.failed or not self._returned or options & (_WNOWAIT | _WNOHANG):
            return None  # without blocking it may have found nothing
        return self._waited(pid if id_type == _P_PID else -1)

    def _waited(self, pid: int) -> Modelled:
        if pid <= 0:
            return "wait", (ANY_CHILD,), ANY_CHILD
        child = self._world.index.get(pid, ANY_CHILD)
        if child not in self._children:
            return None  # an orphan it has adopted
        return "wait", (child,), child

    def _shmget(self, raw: RawCall) -> Modelled:
        if raw.succeeded and raw.value is not None:
            size = raw.number_args(2)[1]
            self._world.segments[raw.value] = max(size, self._world.segments.get(raw.value, 0))
        return None

    def _shmat(self, raw: RawCall) -> Modelled:
        segment, addr, flags = raw.number_args(3)
        if not raw.succeeded or raw.value is None or segment not in self._world.segments:
            return None
        length = self._shared_at[raw.value] = _pages(self._world.segments[segment])
        prot = PROT_READ | (0 if flags & _SHM_RDONLY else PROT_WRITE)
        prot |= PROT_EXEC if flags & _SHM_EXEC else 0
        file_id = self._number(("segment", segment))
        return "mmap", (addr & ~0xFFF, length, prot, MAP_SHARED, file_id, 0), raw.value

    def _shmdt(self, raw: RawCall) -> Modelled:
        addr = raw.number_args(1)[0]
        if not raw.succeeded or addr not in self._shared_at:
            return None
        return "munmap", (addr, self._shared_at.pop(addr)), 0

    def _number(self, identity: Hashable) -> int:
        return self._world.files.setdefault(identity, len(self._world.files))


Modelled = tuple[str, tuple[int, ...], int] | None
_Handler = Callable[[CallTranslator, RawCall], Modelled]
_T = CallTranslator
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("mmap", "mmap2", "old_mmap"), _T._mmap),
    "munmap": _T._munmap,
    "mprotect": _T._mprotect,
    "mremap": _T._mremap,
    "brk": _T._brk,
    **dict.fromkeys(("clone", "clone3", "fork", "vfork"), _T._fork),
    **dict.fromkeys(("execve", "execveat"), _T._exec),
    **dict.fromkeys(("exit", "exit_group"), _T._exit),
    **dict.fromkeys(("wait4", "waitpid"), _T._wait),
    "waitid": _T._waitid,
    "shmget": _T._shmget,
    "shmat": _T._shmat,
    "shmdt": _T._shmdt,
}


def _resolve_waits(calls: list[Call], numbers: list[int]) -> tuple[Call, ...]:
    """Name the child of each wait that did not tell it, where only one can be meant.

    `waitid` returns the child in memory, which a log does not show, and a signal, most often that
    of the child's end, keeps valgrind from printing a result. A child that another wait names is
    not meant; a wait for which no child is left was only broken off.
    """
    named = {call.args[0] for call in calls if call.name == "wait"}
    unnamed: list[int] = []
    n_taken = 0
    resolved: list[Call] = []
    for call, number in zip(calls, numbers, strict=True):
        if call.name == "fork" and call.args[0] not in named:
            unnamed.append(call.args[0])
        elif call.name == "wait" and call.args[0] == ANY_CHILD:
            if n_taken == len(unnamed):
                call = Call(call.at, "other", (number,), -EINTR)
            elif len(unnamed) == 1:
                call = Call(call.at, "wait", (unnamed[0],), unnamed[0])
                unnamed.clear()
            else:
                n_taken += 1
                if n_taken == len(unnamed):
                    unnamed.clear()
                    n_taken = 0
        resolved.append(call)
    return tuple(resolved)


def _other_result(raw: RawCall) -> int:
    if raw.failed and raw.value is not None:
        return -raw.value
    return -EINTR if raw.is_blocked else 0


def _clone_flags(raw: RawCall) -> int:
    return int(raw.text.split(b",")[0].strip(), 16)


def _pages(length: int) -> int:
    return (length + 0xFFF) & ~0xFFF
