"""pread and pwrite: the kernel uses user addresses as the user may, and no further."""

from __future__ import annotations

from typing import Any

import pytest

from penumbra.guest.kernel import KernelOptions, default_layout, page_word
from penumbra.hw.formats import FORMATS, X86_64, FormatSpec
from penumbra.hw.operations import Load, Store, Syscall
from tests.guest.flat_driver import FlatMachine
from tests.guest.scripts import ARENA, PAGE, RO, Script, mmap, saw, script

specs = pytest.mark.parametrize("spec", FORMATS.values(), ids=list(FORMATS))
FILE = 5


def run(spec: FormatSpec, program: Script, n_vcpus: int = 1, **kernel: Any) -> tuple[Any, ...]:
    chosen: dict[str, Any] = {"timer_period": 2000, **kernel}
    machine = FlatMachine(spec, [program], n_vcpus, sticky=True, options=KernelOptions(**chosen))
    pool = machine.kernel.pool.n_free
    ended = machine.run()
    assert not machine.stale
    machine.check_all_returned()
    # Roots, tables and lock pages are kept; a bounce page is not.
    assert pool - machine.kernel.pool.n_free < 8
    seen = [mark.args for mark in machine.marks if mark.what == "saw"]
    return ended, seen, machine.reasons


@pytest.mark.shows("G6")
@specs
def test_pread_into_a_page_shared_copy_on_write_copies_it_first(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 1)
        await Store(ARENA, 8, 1)
        await Syscall("fork", (1,))
        await Syscall("wait", (-1,))
        await saw(await Load(ARENA, 8), await Load(ARENA + 8, 8))

    async def child() -> None:
        await saw(await Syscall("pread", (FILE, 3, ARENA, 16)), await Load(ARENA, 8))

    word = page_word(FILE, 3)
    assert run(spec, script(main, child)) == ("finished", [(16, word), (1, 0)], [])


@pytest.mark.shows("G6")
@specs
def test_pwrite_is_read_back_and_may_cross_pages_that_are_not_there_yet(spec: FormatSpec) -> None:
    async def main() -> None:
        await mmap(ARENA, 4)
        await Store(ARENA + PAGE - 8, 8, 7)
        await saw(await Syscall("pwrite", (FILE, 0, ARENA + PAGE - 8, 16)))
        await saw(await Syscall("pread", (FILE, 0, ARENA + 3 * PAGE - 16, 24)))
        await saw(*[await Load(ARENA + 3 * PAGE - 16 + at, 8) for at in (0, 8, 16)])

    seen = [(16,), (24,), (7, 0, page_word(FILE, 0))]
    assert run(spec, script(main)) == ("finished", seen, [])


@pytest.mark.shows("G6")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (("pread", FILE, 0, ARENA, 8), f"write to read-only {ARENA:#x}"),
        (("pread", FILE, 0, ARENA + PAGE, 8), f"nothing is mapped at {ARENA + PAGE:#x}"),
        (("pwrite", FILE, 0, ARENA + PAGE - 8, 16), f"nothing is mapped at {ARENA + PAGE:#x}"),
    ],
)
def test_what_the_user_may_not_do_the_kernel_does_not_do_for_it(
    call: tuple[Any, ...], reason: str
) -> None:
    async def main() -> None:
        await mmap(ARENA, 1, RO)
        await Syscall(call[0], call[1:])

    assert run(X86_64, script(main)) == ("finished", [], [f"segmentation fault: {reason}"])


@pytest.mark.shows("G6")
@specs
def test_a_pointer_into_the_kernel_is_refused_and_a_user_access_there_ends_by_name(
    spec: FormatSpec,
) -> None:
    window = default_layout(spec, 64, script().used_ranges()).window_gva

    async def main() -> None:
        bad = [(window, 8), (window - 8, 16), (ARENA + 4, 8), (ARENA, 0), (ARENA, 2 * PAGE)]
        await saw(*[await Syscall("pread", (FILE, 0, *one)) for one in bad])
        await Store(window, 8, 1)

    reason = f"segmentation fault: user access to the kernel's page at {window:#x}"
    assert run(spec, script(main)) == ("finished", [(-14, -14, -22, -22, -22)], [reason])


@pytest.mark.shows("G6", "G2")
@pytest.mark.parametrize("n_vcpus", [1, 2, 4])
def test_the_kernel_sleeps_for_a_user_page_that_is_out(n_vcpus: int) -> None:
    async def main() -> None:
        await Syscall("fork", (1, 1))
        await Syscall("fork", (1, 2))
        await Syscall("wait", (-1,))
        await Syscall("wait", (-1,))

    async def child(number: int) -> None:
        await mmap(ARENA, 40)
        for page in range(40):
            await Store(ARENA + page * PAGE, 8, number * 100 + page)
        for page in range(40):
            await Syscall("pwrite", (number, page, ARENA + page * PAGE, 8))
        for page in range(40):
            await Syscall("pread", (number, page, ARENA + page * PAGE + 8, 8))
        wrong = 0
        for page in range(40):
            wrong += await Load(ARENA + page * PAGE + 8, 8) != number * 100 + page
        await saw(wrong)

    ended = run(X86_64, script(main, child), n_vcpus, swap_pages=500, user_frames=100)
    assert ended == ("finished", [(0,), (0,)], [])
