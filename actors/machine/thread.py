"""The task actor of a guest OS thread: it drives the thread's coroutines."""

from __future__ import annotations

from penumbra.actors.machine.messages import (
    EnterCall,
    EnterFault,
    EnterInterrupt,
    EnterProtection,
    Issued,
    Panicked,
    Resume,
    ThreadOrder,
    ThreadReply,
)
from penumbra.actors.runtime import Actor
from penumbra.guest.system import GuestSystem
from penumbra.guest.threads import GuestThread, KernelPanic


class ThreadActor(Actor[ThreadOrder, ThreadReply]):
    """One guest thread: a trap pushes a kernel coroutine, `Resume` pulls the next operation."""

    def __init__(self, thread: GuestThread, kernel: GuestSystem) -> None:
        self._thread = thread
        self._kernel = kernel

    def receive(self, message: ThreadOrder) -> ThreadReply:
        thread, kernel = self._thread, self._kernel
        value = None
        try:
            if message.__class__ is Resume:  # what nearly every message is
                assert isinstance(message, Resume)
                value = message.value
            elif isinstance(message, EnterFault):
                handler = kernel.page_fault(
                    message.vcpu_id, thread.thread_id, message.gva, message.error
                )
                thread.trap(handler, message.retry, interrupts=message.interrupts)
            elif isinstance(message, EnterInterrupt):
                handler = kernel.interrupt(message.vcpu_id, thread.thread_id, message.vector)
                thread.trap(handler, message.retry, interrupts=message.interrupts)
            elif isinstance(message, EnterCall):
                handler = kernel.syscall(
                    message.vcpu_id, thread.thread_id, message.name, message.args
                )
                thread.trap(handler, None, interrupts=message.interrupts)
            else:
                assert isinstance(message, EnterProtection)
                handler = kernel.protection_fault(message.vcpu_id, thread.thread_id, message.reason)
                thread.trap(handler, message.retry, interrupts=message.interrupts)
            work = thread.next(value)
        except KernelPanic as panic:
            return Panicked(str(panic))
        return Issued(work, thread.in_user)
