"""fork, exec, exit, wait, and how processes come to their ends."""

from __future__ import annotations

import pytest

from penumbra.guest.kernel import page_word
from penumbra.guest.kernel.areas import image_object
from penumbra.guest.programs.program import Image, PageRegion
from penumbra.hw.formats import FORMATS, X86_64, FormatSpec
from penumbra.hw.operations import Halt, Invlpg, Load, LoadControl, Store, Syscall
from tests.guest.flat_driver import FlatMachine
from tests.guest.scripts import ARENA, PAGE, RO, RW, Script, mmap, saw, script

specs = pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))
IMAGE_AT = 0x1000_0000


def outcome(
    spec: FormatSpec, program: Script, n_vcpus: int = 1
) -> tuple[str, list[tuple[int, ...]], list[str]]:
    machine = FlatMachine(spec, [program], n_vcpus, sticky=True)
    ended = machine.run()
    machine.check_all_returned()
    assert not machine.stale
    seen = [mark.args for mark in machine.marks if mark.what == "saw"]
    return ended, seen, machine.reasons


@pytest.mark.shows("G3")
@specs
def test_exec_replaces_memory_and_goes_on_in_the_new_image(spec: FormatSpec) -> None:
    images = tuple(
        Image(n, (PageRegion(IMAGE_AT // PAGE + n, 2, RW),), heap=ARENA) for n in range(2)
    )

    async def main() -> None:
        await mmap(ARENA, 1)
        await saw(await Load(IMAGE_AT, 8))
        await Store(IMAGE_AT + PAGE, 8, 1)
        await Syscall("exec", (1, 1, 42))

    async def after(argument: int) -> None:
        await saw(argument, await Load(IMAGE_AT + PAGE, 8), await Syscall("brk", (0,)))
        await Load(IMAGE_AT, 8)

    page = IMAGE_AT // PAGE
    words = page_word(image_object(0), page), page_word(image_object(1), page + 1)
    reason = f"segmentation fault: nothing is mapped at {IMAGE_AT:#x}"
    program = Script((main, after), images)
    assert outcome(spec, program) == ("finished", [words[:1], (42, words[1], ARENA)], [reason])


@pytest.mark.shows("G3")
@specs
def test_the_image_below_is_there_again_when_a_mapping_over_it_goes(spec: FormatSpec) -> None:
    image = Image(0, (PageRegion(ARENA // PAGE, 3, RO),), underlies=True)

    async def main() -> None:
        await mmap(ARENA, 1)
        over = await Load(ARENA, 8)
        await Syscall("munmap", (ARENA, 2 * PAGE))
        await saw(over, await Load(ARENA, 8), await Load(ARENA + PAGE, 8))

    words = [page_word(image_object(0), ARENA // PAGE + n) for n in range(2)]
    assert outcome(spec, Script((main,), (image,))) == ("finished", [(0, *words)], [])


@pytest.mark.shows("G3")
def test_wait_returns_the_children_that_end_and_then_that_there_is_none() -> None:
    async def main() -> None:
        first = await Syscall("fork", (1, 50))
        second = await Syscall("fork", (1, 1))
        await saw(first, second, await Syscall("wait", (first,)), await Syscall("wait", (-1,)))
        await saw(await Syscall("wait", (-1,)), await Syscall("wait", (first,)))

    async def child(turns: int) -> int:
        for _ in range(turns):
            await Syscall("yield")
        return turns

    assert outcome(X86_64, script(main, child)) == ("finished", [(2, 3, 2, 3), (-10, -10)], [])


@pytest.mark.shows("G3")
def test_a_parent_that_ends_first_leaves_its_children_running() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))

    async def child() -> None:
        for _ in range(20):
            await Syscall("yield")
        await saw(1)

    assert outcome(X86_64, script(main, child)) == ("finished", [(1,)], [])


@pytest.mark.shows("G6")
@pytest.mark.parametrize(
    "operation", [Halt(), Invlpg(ARENA), LoadControl(3, 0)], ids=lambda op: type(op).__name__
)
def test_a_privileged_operation_ends_the_program(operation: Halt | Invlpg | LoadControl) -> None:
    async def main() -> None:
        await operation

    reason = f"general protection fault: {type(operation).__name__} in user mode"
    assert outcome(X86_64, script(main)) == ("finished", [], [reason])


def test_a_program_that_raises_ends_alone() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))
        await saw(await Syscall("wait", (-1,)))

    async def child() -> None:
        raise RuntimeError("no such luck")

    assert outcome(X86_64, script(main, child), 2) == (
        "finished",
        [(2,)],
        ["RuntimeError: no such luck"],
    )


@pytest.mark.parametrize("n_vcpus", [1, 2, 4])
def test_a_fault_of_one_thread_ends_its_siblings_wherever_they_are(n_vcpus: int) -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        await Syscall("thread_create", (1,))
        sleeper = await Syscall("thread_create", (2,))
        for _ in range(20):
            await Syscall("yield")
        await Syscall("thread_create", (3,))
        await Syscall("thread_join", (sleeper,))

    async def spinner() -> None:
        while True:
            await Load(ARENA, 8)

    async def sleeper() -> None:
        await Syscall("futex_wait", (ARENA, 0))

    async def culprit() -> None:
        await Load(0, 8)

    program = script(main, spinner, sleeper, culprit)
    reason = "segmentation fault: nothing is mapped at 0x0"
    assert outcome(X86_64, program, n_vcpus) == ("finished", [], [reason])


def test_a_bad_futex_address_ends_the_program_and_frees_the_lock() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))
        await mmap(ARENA, 1)
        await saw(await Syscall("futex_wait", (ARENA, 1)))

    async def child() -> None:
        await Syscall("futex_wait", (8, 0))

    reason = "segmentation fault: nothing is mapped at 0x8"
    assert outcome(X86_64, script(main, child)) == ("finished", [(-11,)], [reason])


def test_what_the_kernel_announces_of_a_process() -> None:
    async def main() -> None:
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))

    async def child() -> int:
        return 5

    machine = FlatMachine(X86_64, [script(main, child)])
    machine.run()
    told = [(mark.what, mark.args[0], mark.text) for mark in machine.marks]
    assert told == [
        ("process_start", 1, "script"),
        ("thread", 1, ""),
        ("process_start", 2, "script"),
        ("thread", 2, ""),
        ("process_exit", 2, ""),
        ("process_exit", 1, ""),
    ]
    assert [process.exit_code for process in machine.kernel.ended] == [0, 5]


@pytest.mark.shows("G6")
def test_a_fault_in_the_kernels_window_is_a_panic() -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        await saw()
        await Store(ARENA, 8, 1)

    machine = FlatMachine(X86_64, [script(main)])
    machine.run_until_mark("saw")
    root = machine.vcpus[0].cr3
    machine.write(root + 256 * 8, 8, 0)
    assert machine.run().startswith("panic: kernel page fault at 0xffff80000")
