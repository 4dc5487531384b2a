"""Large pages: made at a first use or of small ones, split again, and never two sizes at once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from penumbra.guest.kernel import KernelOptions, default_layout
from penumbra.guest.kernel.frames import Frames, OutOfFrames, OutOfMemory, TablePool
from penumbra.guest.kernel.large_pages import LargePages
from penumbra.guest.kernel.shootdown import FLUSHES
from penumbra.guest.workloads import PageSplitting
from penumbra.hw.formats import IA32, PAE, X86_64, FormatSpec
from penumbra.hw.operations import Copy, Load, Store, Syscall
from tests.guest.flat_driver import FlatMachine
from tests.guest.scripts import ARENA, PAGE, RO, RW, SHARED, Script, mmap, saw, script

MIB = 1 << 20
HUGE, NO_HUGE, COLLAPSE = 14, 15, 25
PRESENT, LARGE = 1, 0x80
EAGAIN, ENOMEM, EINVAL = -11, -12, -22
specs = pytest.mark.parametrize("spec", [IA32, X86_64, PAE], ids=lambda spec: spec.name)
Body = Callable[..., Coroutine[Any, Any, None]]


def pages_of(spec: FormatSpec) -> int:
    return 1 << (spec.levels[1].shift - 12)


def at(page: int) -> int:
    return ARENA + page * PAGE


async def advise(n_pages: int, advice: int, first: int = 0) -> int:
    result: int = await Syscall("madvise", (at(first), n_pages * PAGE, advice))
    return result


async def large(n: int) -> None:
    """Map `n` pages as one large page with a number in some of them."""
    await mmap(ARENA, n)
    assert await advise(n, HUGE) == 0
    for page in range(0, n, 64):
        await Store(at(page), 8, page + 1)


async def all_there(n: int, but: tuple[int, ...] = ()) -> None:
    """See that the numbers of `large` are still there."""
    pages = [page for page in range(0, n, 64) if page not in but]
    await saw(*[await Load(at(page), 8) - page for page in pages])


class Sizes:
    """Watches the entry that maps ARENA or points to its leaf table.

    Attributes:
        values: What it has held, without A and D.
        early: How often its kind became another while some VCPU still cached a page of the range.
    """

    def __init__(self, machine: FlatMachine) -> None:
        self._machine = machine
        self._key = ARENA >> machine.spec.levels[1].shift
        self.values = [0]
        self.early = 0
        machine.watch = self._look

    def _entry(self) -> int:
        machine, width = self._machine, self._machine.spec.entry_bytes
        process = machine.kernel.processes.processes[1]
        table, entry = process.space.root.gfn << 12, 0
        for level in reversed(machine.spec.levels[1:]):
            gpa = table + level.index(ARENA) * width
            entry = machine.read(gpa, width)
            table = entry & ((1 << 40) - 1) & ~0xFFF
            if not entry & PRESENT:
                return 0
        return entry & ~0x60

    def _look(self, _: Any) -> None:
        now = self._entry()
        if now == self.values[-1]:
            return
        same_kind = self.values[-1] and not (now ^ self.values[-1]) & LARGE
        self.values.append(now)
        span = self._machine.spec.levels[1].shift - 12
        for vcpu in self._machine.vcpus:
            held = any(vpn >> span == self._key for vpn in vcpu.tlb) or self._key in vcpu.large
            self.early += bool(now) and held and not same_kind

    @property
    def kinds(self) -> str:
        """The values by kind: `.` not present, `t` a table, `L` a large page."""
        kinds = ["L" if v & LARGE else "t" if v else "." for v in self.values]
        return "".join(k for k, before in zip(kinds, [" ", *kinds], strict=False) if k != before)


def run(
    spec: FormatSpec, program: Script, n_vcpus: int = 1, **options: Any
) -> tuple[list[tuple[int, ...]], LargePages, Sizes]:
    machine = FlatMachine(
        spec, [program], n_vcpus, sticky=True, options=KernelOptions(timer_period=5000, **options)
    )
    sizes = Sizes(machine)
    ended = machine.run(), machine.wrong, machine.reasons, machine.stale
    assert ended == ("finished", [], [], [])
    machine.check_all_returned()
    return [m.args for m in machine.marks if m.what == "saw"], machine.kernel.large, sizes


def zeros(spec: FormatSpec, n_missing: int = 0) -> tuple[int, ...]:
    return (1,) * (pages_of(spec) // 64 - n_missing)


@pytest.mark.shows("G7")
@specs
def test_a_range_that_was_asked_for_is_mapped_large_at_its_first_use(spec: FormatSpec) -> None:
    n = pages_of(spec)

    async def main() -> None:
        await large(n)
        await all_there(n)
        await saw(await Load(at(n - 1) + 8, 8))

    machine = FlatMachine(spec, [script(main)], sticky=True)
    sizes = Sizes(machine)
    assert (machine.run(), machine.stale) == ("finished", [])
    machine.check_all_returned()
    assert [m.args for m in machine.marks if m.what == "saw"] == [zeros(spec), (0,)]
    faults = [gva for gva, _ in machine.faults if gva >= ARENA]
    assert (machine.kernel.large.n_mapped, sizes.kinds, faults) == (1, ".L.", [ARENA])


@pytest.mark.shows("G7")
@specs
def test_small_pages_are_promoted_with_what_they_hold_and_their_table_is_given_back(
    spec: FormatSpec,
) -> None:
    n = pages_of(spec)

    async def main() -> None:
        await mmap(ARENA, n)
        for page in range(n - 1, -1, -1):
            await Store(at(page), 8, page + 1)
        await saw(0)
        await saw(await advise(n, COLLAPSE), await advise(n, COLLAPSE))
        await saw(*[await Load(at(page), 8) - page for page in range(0, n, 64)])
        await Store(at(5), 8, 7)
        await saw(await Load(at(5), 8))

    machine = FlatMachine(spec, [script(main)], sticky=True)
    sizes = Sizes(machine)
    machine.auditing = False  # after each of so many faults it would take too long
    machine.run_until_mark("saw")
    machine.auditing = True
    machine.watch, free = sizes._look, machine.kernel.pool.n_free
    machine.run_until_mark("saw")
    assert machine.kernel.pool.n_free == free + 1
    assert machine.run() == "finished"
    seen = [m.args for m in machine.marks if m.what == "saw"]
    assert seen == [(0,), (0, 0), zeros(spec), (7,)]
    # One store to the entry between the sizes, and nobody caches anything when it is made.
    assert (sizes.kinds, sizes.early, machine.stale) == (".t.L.", 0, [])
    machine.check_all_returned()


@pytest.mark.shows("G7")
@pytest.mark.parametrize("moved", [False, True])
def test_pages_that_are_adjacent_in_memory_are_not_copied(moved: bool) -> None:
    copies: list[Copy] = []

    async def main() -> None:
        await large(512)
        await Syscall("mprotect", (at(7), PAGE, RO))
        await Syscall("mprotect", (at(7), PAGE, RW))
        if moved:  # its frame goes and another comes, perhaps the same one
            await Syscall("munmap", (at(7), PAGE))
            await mmap(at(300 + 512), 1)
            await Store(at(300 + 512), 8, 1)
            await mmap(at(7), 1)
            await advise(512, HUGE)
            await Store(at(7), 8, 1)
        await saw(await advise(512, COLLAPSE))
        await all_there(512)

    machine = FlatMachine(X86_64, [script(main)], sticky=True)
    machine.watch = lambda op: copies.append(op) if isinstance(op, Copy) else None
    assert (machine.run(), machine.stale) == ("finished", [])
    seen = [m.args for m in machine.marks if m.what == "saw"]
    assert seen == [(0,), zeros(X86_64)]
    assert machine.kernel.large.n_in_place == (not moved)
    assert len(copies) == (512 if moved else 0)
    machine.check_all_returned()


def _protect(n: int) -> Body:
    async def change() -> None:
        await Syscall("mprotect", (at(n // 2), PAGE, RO))

    return change


def _inaccessible(n: int) -> Body:
    async def change() -> None:
        await Syscall("mprotect", (ARENA, n * PAGE, 0))
        await Syscall("mprotect", (ARENA, n * PAGE, RW))

    return change


def _unmap(n: int) -> Body:
    async def change() -> None:
        await Syscall("munmap", (at(n // 2), PAGE))

    return change


def _unmap_both_ends(n: int) -> Body:
    async def change() -> None:
        await mmap(at(n), 1)
        await Syscall("munmap", (at(n - 1), 2 * PAGE))

    return change


def _map_over(n: int) -> Body:
    async def change() -> None:
        await mmap(at(n // 2), 1)

    return change


def _move(n: int) -> Body:
    async def change() -> None:
        away = ARENA + 64 * MIB
        args = (at(n // 2), PAGE, PAGE, 3, away)
        await Syscall("mremap", args)
        await saw(await Load(away, 8))

    return change


@pytest.mark.shows("G7")
@specs
@pytest.mark.parametrize(
    ("how", "gone"),
    [
        (_protect, False),
        (_inaccessible, False),
        (_unmap, True),
        (_unmap_both_ends, False),
        (_map_over, True),
        (_move, True),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else "",
)
def test_a_call_on_a_part_splits_a_large_page_and_leaves_the_rest(
    spec: FormatSpec, how: Callable[[int], Body], gone: bool
) -> None:
    n = pages_of(spec)

    async def main() -> None:
        await large(n)
        await how(n)()
        await all_there(n, (n // 2,) if gone else ())
        await Store(at(1), 8, 4)
        await saw(await Load(at(1), 8))

    seen, pages, sizes = run(spec, script(main))
    assert seen[-2:] == [zeros(spec, gone), (4,)]
    assert how is not _move or seen[0] == (n // 2 + 1,)
    assert (pages.n_split, sizes.kinds, sizes.early) == (1, ".L.t.", 0)


@pytest.mark.shows("G7")
@specs
def test_a_call_on_a_whole_large_page_leaves_it_one(spec: FormatSpec) -> None:
    n = pages_of(spec)

    async def main() -> None:
        await large(n)
        await saw(await Syscall("mprotect", (ARENA, n * PAGE, RO)))
        await all_there(n)
        await saw(await Syscall("mprotect", (ARENA, n * PAGE, RW)))
        await Store(ARENA, 8, 1)
        await saw(await Syscall("munmap", (at(0), n * PAGE)))
        await mmap(ARENA, n)
        await saw(await Load(ARENA, 8))

    seen, pages, sizes = run(spec, script(main))
    assert seen == [(0,), zeros(spec), (0,), (0,), (0,)]
    assert (pages.n_split, sizes.kinds) == (0, ".L.t.")


@pytest.mark.shows("G7", "G3")
@specs
@pytest.mark.parametrize("writer", ["parent", "child"])
def test_fork_shares_a_large_page_and_who_writes_first_splits_his_own(
    spec: FormatSpec, writer: str
) -> None:
    n = pages_of(spec)

    async def main() -> None:
        await large(n)
        child = await Syscall("fork", (1,))
        if writer == "parent":
            await Store(at(64), 8, 1000)
        await Syscall("wait", (child,))
        if writer == "child":  # alone again: it may be written as it is
            await Store(at(1), 8, 2)
        await all_there(n, (64,))
        await saw(await Load(at(64), 8))

    async def child() -> None:
        if writer == "child":
            await Store(at(64), 8, 2000)
        await all_there(n, (64,))
        await saw(await Load(at(64), 8))

    seen, pages, sizes = run(spec, script(main, child))
    theirs, ours = ((1000,), (65,)) if writer == "parent" else ((65,), (2000,))
    assert seen == [zeros(spec, 1), ours, zeros(spec, 1), theirs]
    assert (pages.n_split, sizes.early) == (1, 0)
    assert ("t" in sizes.kinds) == (writer == "parent")


@pytest.mark.shows("G7", "G4")
@pytest.mark.parametrize(
    ("flush", "n_vcpus", "spec"),
    [
        (FLUSHES[0], 4, X86_64),
        (FLUSHES[1], 2, X86_64),
        (FLUSHES[2], 1, IA32),
        (FLUSHES[3], 2, PAE),
        (FLUSHES[4], 3, X86_64),
    ],
    ids=FLUSHES,
)
def test_threads_that_go_on_writing_lose_nothing_under_any_way_to_flush(
    flush: str, n_vcpus: int, spec: FormatSpec
) -> None:
    program = PageSplitting(rounds=1, mib=4 if spec is IA32 else 2)
    options = KernelOptions(timer_period=3000, flush=flush)
    machine = FlatMachine(spec, [program], n_vcpus, sticky=True, seed=n_vcpus, options=options)
    machine.auditing = False  # too slow at each return; the freed frames are watched all the same
    ended = machine.run(5_000_000), machine.wrong, machine.reasons, machine.stale
    assert ended == ("finished", [], [], [])
    machine.check_all_returned()
    pages = machine.kernel.large
    assert (pages.n_mapped, pages.n_promoted, pages.n_in_place, pages.n_split) == (1, 3, 2, 4)


@pytest.mark.shows("G7", "G8")
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_promotion_without_a_flush_lets_siblings_use_frames_that_were_given_away(
    spec: FormatSpec,
) -> None:
    program = PageSplitting(rounds=1, mib=4 if spec is IA32 else 2)
    options = KernelOptions(timer_period=3000, bugs=frozenset(["promote-without-flush"]))
    machine = FlatMachine(spec, [program], 4, sticky=True, seed=1, options=options)
    machine.auditing = False
    machine.run(3_000_000)
    assert any("uses the freed frame" in line for line in machine.stale)


@pytest.mark.shows("G7", "G2")
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_under_memory_pressure_a_large_page_is_split_and_paged_out(spec: FormatSpec) -> None:
    n, others = pages_of(spec), 120

    async def main() -> None:
        await large(n)
        await mmap(at(n), others)
        for _ in range(2):
            for page in range(n, n + others):
                await Store(at(page), 8, page)
        await all_there(n)
        await saw(sum([await Load(at(page), 8) - page for page in range(n, n + others)]))

    layout = default_layout(spec, 0, [(ARENA // PAGE, 0x4000)])
    # Room for one aligned run and some 100 pages.
    aligned = -(-layout.first_user_gfn // n) * n + n
    frames = aligned - layout.first_user_gfn
    machine = FlatMachine(
        spec, [script(main)], sticky=True, layout=layout,
        options=KernelOptions(timer_period=9000, swap_pages=4000, user_frames=frames),
    )  # fmt: skip
    room = frames - n
    if room > 100:  # the rest is taken, so that both formats have as little
        for _ in range(room - 100):
            machine.kernel.frames.take()
    assert (machine.run(), machine.reasons, machine.stale) == ("finished", [], [])
    assert [m.args for m in machine.marks if m.what == "saw"] == [zeros(spec), (0,)]
    assert (machine.kernel.large.n_mapped, machine.kernel.large.n_split) == (1, 1)
    assert machine.kernel.paging.n_evicted >= 20
    machine.kernel.check()


@specs
def test_advice_that_cannot_be_followed_is_refused_by_its_cause(spec: FormatSpec) -> None:
    n = pages_of(spec)

    async def main() -> None:
        await mmap(ARENA, n)
        await mmap(at(n), n, RW, SHARED)
        await saw(await advise(n, COLLAPSE), await advise(n, 4), await advise(n // 2, COLLAPSE))
        await saw(await Syscall("madvise", (ARENA + 1, PAGE, HUGE)), await advise(0, HUGE))
        await saw(await advise(n, HUGE, n), await advise(n, COLLAPSE, n))
        await saw(await advise(n, HUGE, 2 * n), await advise(n, COLLAPSE, 2 * n))
        await saw(await Syscall("madvise", ((1 << 64) - PAGE, 2 * PAGE, HUGE)))
        await saw(await advise(n, HUGE), await advise(n, NO_HUGE))
        await Store(ARENA, 8, 1)
        await saw(await advise(n, COLLAPSE))

    seen, pages, _ = run(spec, script(main))
    assert seen == [
        (EAGAIN, EINVAL, EINVAL), (EINVAL, EINVAL), (EINVAL, EINVAL), (ENOMEM, ENOMEM),
        (EINVAL,), (0, 0), (EAGAIN,),
    ]  # fmt: skip
    assert (pages.n_mapped, pages.n_promoted) == (0, 0)


@pytest.mark.shows("G7")
def test_without_adjacent_frames_pages_stay_small_and_right() -> None:
    async def main() -> None:
        await large(512)
        for page in range(512):
            await Store(at(page) + 8, 8, page)
        await saw(await advise(512, COLLAPSE))
        await all_there(512)

    seen, pages, _ = run(X86_64, script(main), user_frames=700)
    assert seen == [(ENOMEM,), zeros(X86_64)]
    assert (pages.n_mapped, pages.n_promoted) == (0, 0)


def test_a_run_of_frames_is_aligned_free_and_taken_from_the_top() -> None:
    frames = Frames(10, 54)  # 10 .. 63
    singles = [frames.take() for _ in range(3)]
    assert (singles, frames.take_run(16)) == ([10, 11, 12], 48)
    frames.drop(50)
    assert (frames.take_run(16), frames.references(47)) == (32, 1)
    frames.check()
    assert frames.take_run(16) == 16
    with pytest.raises(OutOfFrames, match="no 16 adjacent frames"):
        frames.take_run(16)
    assert frames.n_free == 54 - 3 - 48 + 1
    frames.check()


def test_a_promised_frame_is_kept_from_everybody_else() -> None:
    pool = TablePool(0, 3)
    pool.promise()
    taken = [pool.take(), pool.take()]
    with pytest.raises(OutOfMemory, match="page-table memory"):
        pool.take()
    with pytest.raises(OutOfMemory, match="page-table memory"):
        pool.promise()
    pool.check()
    assert sorted([*taken, pool.take_promised()]) == [0, 1, 2]
    assert pool.n_promised == 0
