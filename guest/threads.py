"""A guest thread: a stack of coroutines, and the rule by which traps nest on it. Passive.

At the bottom is the user program's coroutine (or, for a kernel thread, a kernel coroutine). Each
trap pushes one kernel coroutine. Whoever drives the thread does, for ever:

    operation = thread.next(result of the previous operation)
    execute it; if it traps, `thread.trap(kernel coroutine, retry, interrupts)` and `next(None)`

and the three kinds of trap differ only in what `retry` is:

    a fault       the operation that faulted: it is issued again when the handler has returned
    an interrupt  the operation that was not begun, or what is left of it (a block, a spin)
    a call        None: the kernel coroutine's return value is the value of the `await`
                  (also a Halt that an interrupt ended: it is over, not issued again)

A kernel coroutine that ends makes the thread emit `TrapReturn`; the ended frame stays on the stack
until that has been executed, because an interrupt may still arrive before it.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeAlias

import msgspec

from penumbra.hw.operations import Operation, Syscall, TrapReturn

GuestCoroutine: TypeAlias = Coroutine[Any, Any, Any]


class KernelPanic(Exception):
    """The guest kernel cannot go on; the virtual machine ends with this text as its reason."""


class _Frame:
    __slots__ = ("coroutine", "interrupts", "retry", "returned", "user", "value")

    def __init__(
        self, coroutine: GuestCoroutine, user: bool, retry: Operation | None, interrupts: bool
    ) -> None:
        self.coroutine = coroutine
        self.user = user
        self.retry = retry
        self.interrupts = interrupts
        self.returned = False
        self.value: Any = None


class GuestThread:
    """One thread of the guest.

    Invariant: only the bottom frame may be a user frame; every frame above it is a kernel frame;
    a frame that has returned is the top one or lies under one that interrupted its TrapReturn.

    Attributes:
        thread_id: Unique in the guest, dense, in order of creation.
        ends_by: Call issued when the program's coroutine returns: "exit" ends the process, with
            what it returned as its code; "thread_exit" this thread alone.
        crash_reason: What the user program raised, once it has; the kernel kills it for that.
    """

    def __init__(self, thread_id: int, coroutine: GuestCoroutine, *, user: bool) -> None:
        self.thread_id = thread_id
        self.ends_by = "exit"
        self.crash_reason = ""
        self._frames = [_Frame(coroutine, user, None, False)]

    @property
    def in_user(self) -> bool:
        """Whether the next operation is the user program's own."""
        return self._frames[-1].user

    @property
    def trapped_from_user(self) -> bool:
        """Whether the running kernel coroutine was entered from user mode."""
        return len(self._frames) > 1 and self._frames[-2].user

    def next(self, result: Any = None) -> Operation:
        """Return the next operation; `result` is the value of the one before.

        Raises:
            KernelPanic: A kernel coroutine failed or a kernel thread ended.
        """
        frame = self._frames[-1]
        if frame.returned:
            self._frames.pop()
            if frame.retry is not None:
                return frame.retry
            result = frame.value
            frame = self._frames[-1]
        try:
            operation = frame.coroutine.send(result)
        except StopIteration as stop:
            return self._ended(frame, stop.value)
        except KernelPanic:
            raise
        except Exception as error:
            return self._failed(frame, error)
        if frame.user and not isinstance(operation, msgspec.Struct):
            self.crash_reason = f"yielded {type(operation).__name__}, which is no operation"
            return Syscall("crash")
        return operation  # type: ignore[no-any-return]

    def trap(self, coroutine: GuestCoroutine, retry: Operation | None, *, interrupts: bool) -> None:
        """Enter the kernel: `coroutine` runs next, in supervisor mode.

        Args:
            retry: What to issue after the return, or None (see the module's text).
            interrupts: The interrupt flag before the trap, which the return restores.
        """
        self._frames.append(_Frame(coroutine, False, retry, interrupts))

    def begin_in_kernel(self, coroutine: GuestCoroutine) -> None:
        """Let a new thread run `coroutine` in the kernel before its program's first operation."""
        assert len(self._frames) == 1
        self.trap(coroutine, None, interrupts=True)

    def replace_program(self, coroutine: GuestCoroutine) -> None:
        """Exchange the user program, as exec does: the trap under way returns to its start."""
        old = self._frames[0]
        assert old.user
        old.coroutine.close()
        self._frames[0] = _Frame(coroutine, True, None, False)

    def close(self) -> None:
        """End every coroutine; the thread must not be running."""
        for frame in reversed(self._frames):
            frame.coroutine.close()

    def check(self) -> None:
        assert self._frames
        assert not any(frame.user for frame in self._frames[1:])

    def _ended(self, frame: _Frame, value: Any) -> Operation:
        if frame.user:
            if self.ends_by == "exit":
                return Syscall("exit", (value if isinstance(value, int) else 0,))
            return Syscall(self.ends_by)
        if len(self._frames) == 1:
            raise KernelPanic(f"kernel thread {self.thread_id} ended")
        frame.returned = True
        frame.value = value
        return TrapReturn(self._frames[-2].user, frame.interrupts)

    def _failed(self, frame: _Frame, error: Exception) -> Operation:
        text = f"{type(error).__name__}: {error}"
        if frame.user:
            self.crash_reason = text
            return Syscall("crash")
        raise KernelPanic(f"kernel bug in thread {self.thread_id}: {text}") from error
