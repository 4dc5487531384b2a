"""GuestThread: what it asks for, given how each operation went."""

from __future__ import annotations

from typing import Any

import pytest

from penumbra.guest.threads import GuestThread, KernelPanic
from penumbra.hw.operations import Fill, Load, Store, Syscall, TrapReturn


async def two_loads() -> None:
    first = await Load(0x1000, 4)
    await Store(0x2000, 4, first + 1)


async def kernel_work(value: Any = None) -> Any:
    await Fill(0x8000, 4096, 0)
    return value


def user_thread() -> GuestThread:
    return GuestThread(7, two_loads(), user=True)


def test_a_faulted_operation_is_issued_again_after_its_handler() -> None:
    thread = user_thread()
    load = thread.next()
    thread.trap(kernel_work(), load, interrupts=True)
    asked = [thread.next(), thread.next(), thread.next(), thread.next(41)]
    assert asked == [
        Fill(0x8000, 4096, 0),
        TrapReturn(True, True),
        Load(0x1000, 4),
        Store(0x2000, 4, 42),
    ]
    thread.close()


def test_the_value_of_a_call_is_what_the_kernel_returned() -> None:
    async def program() -> None:
        await Store(0, 4, await Syscall("getpid") + 1)

    thread = GuestThread(1, program(), user=True)
    assert thread.next() == Syscall("getpid")
    thread.trap(kernel_work(99), None, interrupts=False)
    asked = [thread.next(), thread.next(), thread.next()]
    assert asked == [Fill(0x8000, 4096, 0), TrapReturn(True, False), Store(0, 4, 100)]
    thread.close()


def test_an_interrupt_between_a_handlers_end_and_its_return_nests() -> None:
    thread = user_thread()
    load = thread.next()
    thread.trap(kernel_work(), load, interrupts=True)
    thread.next()
    leaving = thread.next()
    assert leaving == TrapReturn(True, True)
    thread.trap(kernel_work(), leaving, interrupts=True)
    assert not thread.trapped_from_user
    asked = [thread.next(), thread.next(), thread.next(), thread.next()]
    assert asked == [Fill(0x8000, 4096, 0), TrapReturn(False, True), leaving, load]
    thread.check()
    thread.close()


def test_what_a_trap_came_from_is_known_while_it_is_served() -> None:
    thread = user_thread()
    assert (thread.in_user, thread.trapped_from_user) == (True, False)
    thread.trap(kernel_work(), thread.next(), interrupts=True)
    assert (thread.in_user, thread.trapped_from_user) == (False, True)
    thread.trap(kernel_work(), thread.next(), interrupts=True)
    assert (thread.in_user, thread.trapped_from_user) == (False, False)
    thread.close()


def test_a_program_that_returns_exits_with_what_it_returned() -> None:
    async def program() -> int:
        return 3

    assert GuestThread(1, program(), user=True).next() == Syscall("exit", (3,))
    further_thread = GuestThread(1, program(), user=True)
    further_thread.ends_by = "thread_exit"
    assert further_thread.next() == Syscall("thread_exit")


def test_a_program_that_raises_crashes_with_the_reason() -> None:
    async def program() -> None:
        await Load([][0], 4)

    thread = GuestThread(1, program(), user=True)
    assert thread.next() == Syscall("crash")
    assert thread.crash_reason == "IndexError: list index out of range"


def test_a_program_that_awaits_something_else_crashes() -> None:
    class NoOperation:
        def __await__(self) -> Any:
            yield "text"

    async def program() -> None:
        await NoOperation()

    thread = GuestThread(1, program(), user=True)
    assert thread.next() == Syscall("crash")
    assert thread.crash_reason == "yielded str, which is no operation"
    thread.close()


def test_a_kernel_coroutine_that_raises_is_a_panic() -> None:
    async def broken() -> None:
        raise ValueError("lost count")

    thread = user_thread()
    thread.trap(broken(), thread.next(), interrupts=True)
    with pytest.raises(KernelPanic, match="kernel bug in thread 7: ValueError: lost count"):
        thread.next()
    thread.close()


def test_a_kernel_thread_that_ends_is_a_panic() -> None:
    async def over() -> None:
        return None

    with pytest.raises(KernelPanic, match="kernel thread 0 ended"):
        GuestThread(0, over(), user=False).next()


def test_exec_returns_to_the_start_of_the_new_program() -> None:
    thread = user_thread()
    thread.next()
    thread.trap(kernel_work(), None, interrupts=True)
    thread.next()
    thread.replace_program(two_loads())
    assert [thread.next(), thread.next()] == [TrapReturn(True, True), Load(0x1000, 4)]
    thread.close()
