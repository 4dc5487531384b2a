"""The text of lackey's system-call lines, put together to whole calls.

Valgrind prints a call in pieces. The name and arguments come first; the result follows on the same
line, on the next one (` --> [pre-success] Success(0x2a)`, after a fork), or, for a call that may
block (` --> [async] ...`), on a later line of its own; a blocked call that a signal broke off gets
none. A string argument is printed as it is, newlines included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from penumbra.guest.traces.errors import TraceError

_CALL = re.compile(rb"SYSCALL\[(\d{1,10}),(\d{1,10})\]\( *(\d{1,10})\) ?(.*)", re.DOTALL)
_NAME = re.compile(rb"(?:sys_)?(\w+)(?:\[[^\]]*\])? ?\(")
_RESULT = re.compile(rb"(?:\[[\w-]+\] )?(Success|Failure)\(0x([0-9a-f]{1,16})\b")
_VALGRIND = re.compile(rb"(==|--|\*\*)(\d{1,10})\1 ?(.*)", re.DOTALL)
_PARENT = re.compile(rb"Parent PID: (\d{1,10})\b")
_KILLED = re.compile(rb"Process terminating with default action of signal (\d{1,3})\b")
_VERSION = re.compile(rb"Using Valgrind-(\S+)")
_CREATED = re.compile(rb"process \d+ created child (\d{1,10})\b")
_FORKS = ("fork", "vfork", "clone", "clone3")
_ARROW = b"--> "
_GAVE_UP = b"valgrind: "


@dataclass
class RawCall:
    """One call as printed.

    Attributes:
        line: Line number of its first piece.
        before: References that precede it in the log.
        number: System-call number.
        name: Without `sys_`; empty when valgrind knows none.
        text: Everything behind the name's opening bracket, result included.
        value: The result's number, None while or when there is none.
        failed: The number is an errno.
        is_blocked: It waits for a result; at the end of the log: a signal broke it off.
    """

    line: int
    before: int
    number: int
    name: str
    text: bytes
    value: int | None = None
    failed: bool = False
    is_blocked: bool = False

    def number_args(self, count: int) -> list[int]:
        """Read the first `count` arguments; raises ValueError where they are not numbers."""
        words = self.text.partition(b")")[0].split(b",")[:count]
        if len(words) < count:
            raise ValueError(f"{self.name} with {len(words)} arguments")
        return [int(word.strip().decode("ascii", "replace"), 0) for word in words]

    @property
    def created_pid(self) -> int | None:
        """The child's pid when this is a fork that made one."""
        match = _CREATED.search(self.text) if self.name in _FORKS else None
        return int(match[1]) if match else None

    @property
    def succeeded(self) -> bool:
        return self.value is not None and not self.failed


class CallReader:
    """Takes the lines of one log that are no references, in order."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.calls: list[RawCall] = []
        self.pid: int | None = None
        self.parent_pid: int | None = None
        self.version = ""
        self.signal: int | None = None
        self.starts_at_fork = False
        self._tid: int | None = None

    def feed(self, line: int, n_references: int, text: bytes) -> bool:
        """Take one line; True when it starts a system call.

        Args:
            line: Its number.
            n_references: How many references the log held before it.
            text: Without the newline.

        Raises:
            TraceError: The line is none of lackey's, or of a recording that cannot be used.
        """
        if text.startswith(b"SYSCALL["):
            return self._system_call(line, n_references, text)
        if match := _VALGRIND.match(text):
            self._message(line, int(match[2]), match[3])
        elif self.calls and self._is_unfinished(self.calls[-1]):
            self.calls[-1].text += b"\n" + text
            self._take_result(self.calls[-1], text)
        elif text.startswith(b" --> ") and not self.calls and not n_references:
            self.starts_at_fork = True
        elif text.startswith(_GAVE_UP):
            said = _shown(text.removeprefix(_GAVE_UP).strip())
            hint = "a 32-bit program needs the package libc6-dbg:i386"
            raise self.error(line, f"valgrind gave up: {said}; {hint}")
        elif text.strip():
            raise self.error(line, f"not a line of a lackey log: {_shown(text)}")
        return False

    def created(self) -> Iterator[tuple[int, int]]:
        """Yield line and child's pid of each fork."""
        for call in self.calls:
            if (pid := call.created_pid) is not None:
                yield call.line, pid

    def broke_off_at_its_end(self, index: int) -> bool:
        """Say whether a call without result had nevertheless returned when the signal came.

        Then the program goes on behind the call after the handler's return; a call that had not
        returned is made again, after nothing but its own instruction.
        """
        for back, after in zip(self.calls[index + 1 :], self.calls[index + 2 :], strict=False):
            if back.name.endswith("sigreturn"):
                again = after.number == self.calls[index].number
                return not (again and after.before == back.before + 1)
        return False

    def error(self, line: int, cause: str) -> TraceError:
        return TraceError(self.file, f"line {line}", cause)

    def _system_call(self, line: int, n_references: int, text: bytes) -> bool:
        match = _CALL.match(text)
        if match is None:
            raise self.error(line, f"not a line of a lackey log: {_shown(text)}")
        pid, tid, number = (int(match[group]) for group in (1, 2, 3))
        self._know_pid(line, pid)
        if self._tid not in (None, tid):
            raise self.error(line, "a second thread: threads sharing an address space cannot be "
                                   "replayed, as references carry no thread number")  # fmt: skip
        self._tid = tid
        body = match[4]
        if body.startswith(b"... [async]"):
            self._complete(line, number, body)
            return False
        name = _NAME.match(body)
        call = RawCall(
            line,
            n_references,
            number,
            name[1].decode("ascii", "replace") if name else "",
            body[name.end() :] if name else body,
        )
        self._take_result(call, body)
        self.calls.append(call)
        return True

    def _complete(self, line: int, number: int, body: bytes) -> None:
        call = self.calls[-1] if self.calls else None
        if call is None or not call.is_blocked or call.number != number:
            raise self.error(line, f"call {number} completes but was not waiting")
        call.is_blocked = False
        self._take_result(call, body)

    def _take_result(self, call: RawCall, text: bytes) -> None:
        _, arrow, result = text.rpartition(_ARROW)
        if not arrow:
            return
        if match := _RESULT.match(result):
            call.value, call.failed = int(match[2], 16), match[1] == b"Failure"
        elif result.startswith(b"[async] ..."):
            call.is_blocked = True

    @staticmethod
    def _is_unfinished(call: RawCall) -> bool:
        return call.value is None and not call.is_blocked and b"NoWriteResult" not in call.text

    def _message(self, line: int, pid: int, text: bytes) -> None:
        self._know_pid(line, pid)
        if match := _PARENT.match(text):
            self.parent_pid = int(match[1])
        elif match := _VERSION.match(text):
            self.version = match[1].decode("ascii", "replace")
        elif match := _KILLED.match(text):
            self.signal = int(match[1])

    def _know_pid(self, line: int, pid: int) -> None:
        if self.pid not in (None, pid):
            raise self.error(line, f"process {pid} in the log of process {self.pid}: "
                                   "record with one log per process (%p)")  # fmt: skip
        self.pid = pid


def _shown(text: bytes) -> str:
    return ascii(text[:60].decode("latin-1"))
