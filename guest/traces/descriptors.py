"""Which file a process's descriptors mean, as far as its log tells.

Opening, duplicating and closing are followed. A file is the path by which it was opened, taken from
the directory it started at; a descriptor of unknown origin counts as a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field

from penumbra.guest.traces.syscalls import RawCall

_PATH = re.compile(rb" ?(?:(-?\d+), )?0x[0-9a-f]+\((.*)\)(?:, [^,()]*)* ?\)", re.DOTALL)
_AT_FDCWD = -100
_F_DUPFD, _F_DUPFD_CLOEXEC = 0, 1030


def signed_fd(value: int) -> int:
    """Read a 32-bit argument that may have been printed without its sign."""
    return value - (1 << 32) if 1 << 31 <= value < 1 << 32 else value


@dataclass
class Descriptors:
    """The open files of one process.

    Attributes:
        owner: Index of the process.
        files: Identity of each descriptor's file, where known.
        directory: Identity of the working directory, None at the start.
    """

    owner: int
    files: dict[int, Hashable] = field(default_factory=dict)
    directory: Hashable = None
    _n_unknown: int = 0

    def fork(self, owner: int) -> Descriptors:
        return Descriptors(owner, dict(self.files), self.directory)

    def identity(self, fd: int) -> Hashable:
        if fd not in self.files:
            self.files[fd] = ("unknown", self.owner, self._n_unknown)
            self._n_unknown += 1
        return self.files[fd]

    def follow(self, raw: RawCall) -> None:
        """Follow one call; those that failed or concern no descriptor do nothing.

        Raises:
            ValueError: An argument is no number.
        """
        if not raw.succeeded or raw.value is None:
            return
        match raw.name:
            case "open" | "openat" | "openat2" | "creat":
                self._open(raw, raw.value)
            case "close":
                self.files.pop(self._first(raw), None)
            case "dup" | "dup2" | "dup3":
                self.files[raw.value] = self.identity(self._first(raw))
            case "fcntl" | "fcntl64":
                if raw.number_args(2)[1] in (_F_DUPFD, _F_DUPFD_CLOEXEC):
                    self.files[raw.value] = self.identity(self._first(raw))
            case "memfd_create":
                self.files.pop(raw.value, None)
            case "chdir":
                self._change_directory(raw)
            case "fchdir":
                self.directory = self.identity(self._first(raw))
            case _:
                pass

    def _open(self, raw: RawCall, fd: int) -> None:
        match = _PATH.match(raw.text)
        if match is None:
            self.files.pop(fd, None)
            return
        base: Hashable = None
        if not match[2].startswith(b"/"):
            at = signed_fd(int(match[1])) if match[1] else _AT_FDCWD
            base = self.directory if at == _AT_FDCWD else self.identity(at)
        self.files[fd] = ("path", base, match[2])

    def _change_directory(self, raw: RawCall) -> None:
        if match := _PATH.match(raw.text):
            base = None if match[2].startswith(b"/") else self.directory
            self.directory = ("path", base, match[2])

    @staticmethod
    def _first(raw: RawCall) -> int:
        return signed_fd(raw.number_args(1)[0])
