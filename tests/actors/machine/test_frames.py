"""Guest memory on fewer, moving and shared machine frames: right, coherent, equal to native."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from bare_guest import BareGuest, run_bare
from machines import SMALL_CHURN, run_machine, scheme_with, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.mappings import SecondLevelMappings, ShadowMappings
from penumbra.actors.machine.run import RunResult, simulate
from penumbra.actors.observe.events import EventKind
from penumbra.actors.vmm.residents import Residents
from penumbra.actors.vmm.schemes import PRESETS, WriteBufferOptions
from penumbra.actors.vmm.subvmm import SubVmm
from penumbra.actors.vmm.vtlb.state import State
from penumbra.guest.workloads.mmap_churn import READ_ONLY
from penumbra.guest.workloads.verify import ARENA_AT, RW, SHARED_AT, WORD, expect
from penumbra.guest.workloads.workload import Workload, named_workload
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import CR0_PE, CR0_PG, PAGE_BYTES
from penumbra.hw.operations import Invlpg, Load, LoadControl, SpinUntil, Store, Syscall

pytestmark = pytest.mark.shows("V3")

TRACED = ("shootdown", "patch", "write-buffer", "out-of-sync")
MONITORED = (*TRACED, "vtlb", "vtlb-smp", "nested")
STORM = named_workload("fork-storm", depth=2, pages=16, rounds=2)
THRASH = named_workload("swap-thrash", processes=2, threads=2, pages=64, rounds=2)
GUEST_SWAP: dict[str, Any] = {"user_frames": 40, "disk_mib": 1, "disk_latency": 700}
RESTLESS: dict[str, Any] = {
    "host_frames": 44, "host_moves": 1000, "share_pages": 4000, "quantum": 300,
    "timer_period": 3000,
}  # fmt: skip


def left_by(summary: dict[str, Any]) -> list[object]:
    return [summary["progress"], summary["marks"], [
        (p["pid"], p["ended"], p["pages"], p["digest"]) for p in summary["processes"]
    ]]  # fmt: skip


def as_on_native(workload: Workload, scheme: str, **config: Any) -> Counter[str]:
    """Run with and without a monitor; assert that the guest saw no difference; return counters."""
    runs = []
    for name in ("native", scheme):
        _, summary, verdict = run_machine(workload, name, **config)
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        assert summary["ended"] == "finished"
        runs.append(summary)
    assert left_by(runs[0]) == left_by(runs[1])
    return Counter(runs[1]["counters"])


@pytest.mark.shows("S3", "C5")
@pytest.mark.parametrize(
    ("scheme", "paging", "vcpus", "tlb", "frames"),
    [
        ("shootdown", "ia32", 1, 8, 34),
        ("shootdown", "x86-64", 4, 1536, 44),
        ("patch", "ia32", 1, 8, 34),
        ("patch", "pae", 2, 64, 38),
        ("patch", "x86-64", 4, 1536, 44),
        ("patch-flood", "x86-64", 3, 8, 40),
        ("patch-shared", "pae", 2, 64, 38),
        ("write-buffer", "pae", 2, 64, 38),
        ("out-of-sync", "x86-64", 3, 8, 40),
        ("vtlb", "ia32", 1, 8, 34),
        ("vtlb-smp", "x86-64", 4, 1536, 44),
        ("vtlb-eager", "x86-64", 3, 8, 40),
        ("nested", "ia32", 1, 8, 34),
        ("nested", "pae", 2, 64, 38),
    ],
)
def test_a_guest_runs_in_a_fraction_of_the_frames_it_uses(
    scheme: str, paging: str, vcpus: int, tlb: int, frames: int
) -> None:
    seen = as_on_native(
        THRASH, scheme, paging=paging, vcpus=vcpus, tlb_entries=tlb, tlb_ways=12 if tlb > 64 else 4,
        host_frames=frames, timer_period=3000,
    )  # fmt: skip
    assert seen["host_page_in"] > 50
    assert seen["host_page_out"] > seen["host_page_in"]
    if PRESETS[scheme].detect != "none":
        assert seen["trace_removed"], "tables were among what was swapped"


@pytest.mark.shows("G2")
@pytest.mark.parametrize(
    ("scheme", "paging", "vcpus", "tlb"),
    [
        ("shootdown", "ia32", 4, 8),
        ("patch", "x86-64", 2, 512),
        ("patch", "pae", 1, 64),
        ("write-buffer", "x86-64", 2, 512),
        ("out-of-sync", "ia32", 4, 8),
        ("vtlb", "x86-64", 2, 512),
        ("vtlb-eager", "ia32", 4, 8),
        ("nested", "pae", 1, 64),
        ("nested", "x86-64", 2, 512),
    ],
)
def test_guest_and_kernel_both_swap_while_frames_move_and_are_shared(
    scheme: str, paging: str, vcpus: int, tlb: int
) -> None:
    seen = as_on_native(
        THRASH, scheme, paging=paging, vcpus=vcpus, tlb_entries=tlb, tlb_ways=4,
        **GUEST_SWAP, **RESTLESS,
    )  # fmt: skip
    counted = ("dma", "host_page_in", "host_page_out", "frames_moved", "pages_shared")
    assert all(seen[name] > 20 for name in counted), seen
    assert seen["pages_unshared"] > 20


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("shootdown", {}),
        ("patch", {"capacity": 1}),
        ("patch", {}),
        ("write-buffer", {"buffer": WriteBufferOptions(records=4)}),
        ("out-of-sync", {"unsync": 2}),
        ("vtlb", {"sharing": "vm"}),
        ("vtlb-smp", {"prefetch": 4}),
        ("nested", {}),
    ],
)
def test_processes_that_fork_and_die_leave_the_same_on_frames_that_move(
    scheme: str, options: dict[str, Any]
) -> None:
    _, native, _ = run_machine(STORM, "native", vcpus=4, **RESTLESS)
    _, here, verdict = run_machine(STORM, scheme_with(scheme, **options), vcpus=4, **RESTLESS)
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert left_by(native) == left_by(here)


@pytest.mark.shows("H12")
@pytest.mark.parametrize("scheme", [*TRACED, "vtlb"])
def test_a_tlb_that_the_monitor_fills_follows_too(scheme: str) -> None:
    seen = as_on_native(
        SMALL_CHURN, scheme, vcpus=4, tlb="software", tlb_entries=16, tlb_ways=4,
        **{**RESTLESS, "host_moves": 100, "share_pages": 1000},
    )  # fmt: skip
    assert seen["frames_moved"] > 20


def toggled() -> SmallProgram:
    """A thread makes pages read-only and writable again and again, another one reads them.

    The change to writable needs no flush: its patches wait in the reader's channel until an event
    of the reader's own, a timer tick, while frames move.
    """
    n_pages, rounds = 12, 20

    async def main() -> None:
        await map_pages(SHARED_AT, 1)
        await map_pages(ARENA_AT, n_pages)
        for page in range(n_pages):
            await Store(ARENA_AT + page * PAGE_BYTES, WORD, page + 7)
        sibling = await Syscall("thread_create", (1,))
        for _ in range(rounds):
            for protection in (READ_ONLY, RW):
                await Syscall("mprotect", (ARENA_AT, n_pages * PAGE_BYTES, protection))
                for page in range(n_pages):
                    await expect(ARENA_AT + page * PAGE_BYTES, page + 7)
            for _ in range(100):
                await Load(SHARED_AT, WORD)
        await Store(SHARED_AT, WORD, 1)
        await Syscall("thread_join", (sibling,))

    async def reader() -> None:
        while not await Load(SHARED_AT, WORD):
            for page in range(n_pages):
                await expect(ARENA_AT + page * PAGE_BYTES, page + 7)

    return SmallProgram("toggled", (main, reader))


@pytest.mark.shows("EP3")
def test_moves_while_patches_are_in_flight_are_noticed_if_the_count_is_not_looked_at() -> None:
    config: dict[str, Any] = {
        "vcpus": 2, "host_moves": 20, "quantum": 40, "timer_period": 500, "guest_flush": "lazy",
        "max_progress": 200_000,
    }  # fmt: skip
    verdicts = []
    for scheme in (PRESETS["patch"], scheme_with("patch", order="no_count_check")):
        result = simulate(
            machine=MachineConfig(**config), scheme=scheme, workload=workload_of(toggled()),
            costs=CostProfile(),
        )  # fmt: skip
        assert result.summary["counters"]["patch_applied"] > 100
        assert result.verdict is not None
        verdicts.append(result.verdict.coherent)
    assert verdicts == [True, False]


def not_told(mappings: type, method: str, patch: pytest.MonkeyPatch) -> None:
    """Let a way of telling who maps a frame do nothing for VCPU 1, or for all it is meant for."""
    told = getattr(mappings, method)

    def tell(self: Any, *args: Any) -> None:
        if getattr(self, "vcpu_id", 1) != 1:
            told(self, *args)

    patch.setattr(mappings, method, tell)


MOVES: dict[str, Any] = {"host_moves": 100, "quantum": 100}


@pytest.mark.parametrize(
    ("scheme", "mappings", "method", "config"),
    [
        ("patch", SubVmm, "forget_frame", {"host_frames": 40}),
        ("patch", SubVmm, "forget_frame", MOVES),
        ("vtlb", State, "forget_frame", {"host_frames": 40}),
        ("vtlb", State, "forget_frame", MOVES),
        ("nested", SecondLevelMappings, "_flush", MOVES),
    ],
)
def test_a_cpu_that_is_not_told_uses_a_frame_that_is_anothers_and_is_caught(
    scheme: str,
    mappings: type,
    method: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    not_told(mappings, method, monkeypatch)
    machine = MachineConfig(vcpus=2, max_progress=200_000, **config)
    result = simulate(machine=machine, scheme=PRESETS[scheme], workload=THRASH, costs=CostProfile())
    assert result.verdict is not None
    assert not result.verdict.coherent


TABLE = 2


def read_through_a_table_that_moves(scheme: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Change an entry, let its table move, flush, and return what is read through it then."""
    link, page, other, entry = 7, 0x8000, 0xA000, (TABLE << 12) + 8 * 4
    turn, resident = itertools.count(), Residents.gfns

    def one_after_the_other(residents: Residents) -> list[int]:
        # What is read stays; and the table does not come back to a frame it has left.
        gfns = [gfn for gfn in resident(residents) if gfn not in (page >> 12, other >> 12)]
        return [gfns[next(turn) % len(gfns)]] if gfns else []

    monkeypatch.setattr(Residents, "gfns", one_after_the_other)
    seen: list[int] = []

    async def main() -> None:
        await Store(0x8000, WORD, 8)
        await Store(0x9000, WORD, 9)
        for gfn in range(16):
            await Store((TABLE << 12) + gfn * 4, 4, gfn << 12 | link)
        await Store(1 << 12, 4, TABLE << 12 | link)
        await LoadControl(3, 1 << 12)
        await LoadControl(0, CR0_PE | CR0_PG)
        assert await Load(page, WORD) == 8
        await Load(other, WORD)
        await Store(entry, 4, 0x9000 | link)
        for _ in range(100):
            await Load(other, WORD)
        await Invlpg(page)
        seen.append(await Load(page, WORD))

    machine = run_bare(BareGuest([main]), scheme, host_moves=10, quantum=10)
    if PRESETS[scheme].shadow != "none":
        assert machine.observer.totals()["frames_moved"] > 5
    return seen[0]


@pytest.mark.shows("EG2")
@pytest.mark.parametrize("scheme", PRESETS)
def test_what_was_stored_to_a_table_that_has_moved_counts_at_the_flush(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_through_a_table_that_moves(scheme, monkeypatch) == 9


@pytest.mark.shows("EG2")
def test_records_that_are_read_after_their_frame_has_moved_are_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    not_told(ShadowMappings, "_tell_logged", monkeypatch)
    assert read_through_a_table_that_moves("write-buffer", monkeypatch) == 8


@pytest.mark.shows("S3")
def test_the_checker_changes_nothing_and_the_seed_decides_everything() -> None:
    summaries = [
        run_machine(THRASH, "patch", vcpus=2, check=check, **GUEST_SWAP, **RESTLESS)[1]
        for check in (True, False, True)
    ]
    assert summaries[0] == summaries[1] == summaries[2]


def test_every_frame_that_comes_goes_or_moves_is_an_event() -> None:
    machine, summary, _ = run_machine(THRASH, "patch", vcpus=2, **RESTLESS)
    seen, kinds = summary["counters"], Counter(machine.observer.events.columns()["kind"].tolist())
    assert kinds[EventKind.FRAME_IN] == seen["host_page_in"] + seen["host_zero_fill"]
    assert kinds[EventKind.FRAME_OUT] == seen["host_page_out"] + seen.get("host_zero_drop", 0)
    assert kinds[EventKind.FRAME_MOVED] == seen["frames_moved"] + seen["pages_unshared"]
    assert kinds[EventKind.FRAME_SHARED] >= seen["pages_shared"]
    free = run_machine(THRASH, "patch", vcpus=2, costs=CostProfile(host_page_in=0), **RESTLESS)[1]
    assert summary["cost"] - free["cost"] == 100_000 * seen["host_page_in"]


def test_without_a_monitor_the_options_mean_nothing() -> None:
    plain = run_machine(THRASH, "native", quantum=300, timer_period=3000)[1]
    assert run_machine(THRASH, "native", **RESTLESS)[1] == plain


# ---- sharing and copy on write -------------------------------------------------------------------


def same_then_different() -> SmallProgram:
    """Two threads fill pages alike, wait, and then each writes its own into every second one."""
    n_pages, go, rounds = 24, ARENA_AT, 3000

    async def fill(first: int, value: int) -> None:
        for page in range(first, n_pages, 2):
            await Store(go + (1 + page) * PAGE_BYTES, WORD, value)

    async def look(first: int, value: int) -> bool:
        return all(
            [await expect(go + (1 + page) * PAGE_BYTES, value) for page in range(first, n_pages, 2)]
        )

    async def main() -> None:
        await map_pages(go, n_pages + 1)
        await fill(0, 7)
        await fill(1, 7)
        sibling = await Syscall("thread_create", (1,))
        for _ in range(rounds):
            await Load(go, WORD)
        await fill(0, 8)
        await Syscall("thread_join", (sibling,))
        assert await look(0, 8)
        assert await look(1, 9)

    async def other() -> None:
        for _ in range(rounds):
            await Load(go, WORD)
        await look(1, 7)
        await fill(1, 9)

    return SmallProgram("same-then-different", (main, other))


@pytest.mark.parametrize("scheme", MONITORED)
def test_pages_that_are_equal_share_a_frame_until_one_is_written(scheme: str) -> None:
    machine, summary, verdict = run_machine(
        workload_of(same_then_different()), scheme, vcpus=2, host_frames=400, share_pages=2000
    )
    assert (summary["ended"], summary["marks"]) == ("finished", [])
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert summary["counters"]["pages_shared"] >= 23
    assert summary["counters"]["pages_unshared"] >= 12
    _, native, _ = run_machine(workload_of(same_then_different()), "native", vcpus=2)
    assert left_by(native) == left_by(summary)
    assert machine.memory.n_unready


@pytest.mark.parametrize("scheme", ["native", *MONITORED])
def test_who_spins_on_a_word_in_a_shared_frame_is_woken_by_its_store(scheme: str) -> None:
    word, as_empty, elsewhere = 0x5000, 0x6000, 0x7000

    async def spinner() -> None:
        for _ in range(200):
            await Load(word, WORD)
            await Load(as_empty, WORD)
        await SpinUntil(word, WORD, 1, 1)
        guest.done[0] = 1

    async def writer() -> None:
        for at in range(1000):
            await Store(elsewhere, WORD, at)
        await Store(word, WORD, 1)

    guest = BareGuest([spinner, writer])
    machine = run_bare(guest, scheme, share_pages=100, quantum=20)
    assert guest.done[0] == 1
    if scheme != "native":
        assert machine.observer.totals()["pages_shared"] >= 1
        machine.memory.check()


# ---- several VMs on one kernel -------------------------------------------------------------------


def run_vms(scheme: str, **config: Any) -> RunResult:
    machine = MachineConfig(
        vcpus=2, cpus=2, vms=3, slice=2000, quantum=500, timer_period=3000, **config
    )
    return simulate(
        machine=machine, scheme=PRESETS[scheme], workload=THRASH, costs=CostProfile(), seed=3
    )


@pytest.mark.shows("V7")
@pytest.mark.parametrize("scheme", MONITORED)
def test_vms_that_compete_for_the_kernels_frames_never_use_each_others(scheme: str) -> None:
    native = run_vms("native").summary
    result = run_vms(scheme, host_frames=40, share_pages=5000, host_moves=2000)
    assert result.verdict is not None
    assert result.verdict.coherent, result.verdict.explain()
    assert result.summary["trespasses"] == []
    assert left_by(result.summary) == left_by(native)
    assert result.summary["counters"]["host_page_in"] > 100
    columns = result.events.columns()
    given = columns["kind"] == EventKind.FRAME_IN
    users: dict[int, set[int]] = {}
    for vm, pfn in zip(columns["vm"][given], columns["arg1"][given], strict=True):
        users.setdefault(int(pfn), set()).add(int(vm))
    assert sum(len(vms) > 1 for vms in users.values()) > 20, "frames go from one VM to another"


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"host_frames": 33, "vcpus": 1}, "machine.host_frames is 33: must be 0 or at least 34"),
        ({"host_frames": -1}, "machine.host_frames is -1: must not be negative"),
        ({"host_moves": -5}, "machine.host_moves is -5: must not be negative"),
        ({"share_pages": -5}, "machine.share_pages is -5: must not be negative"),
    ],
)
def test_what_cannot_be_is_refused_by_name(config: dict[str, Any], why: str) -> None:
    assert MachineConfig(**config).problem() == why
