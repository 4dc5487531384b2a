"""Frames that a guest lends to what is below it: gone from there, zeros when they are touched."""

from __future__ import annotations

from typing import Any

import pytest
from bare_guest import BareGuest, run_bare
from machines import FAMILIES, run_machine, workload_of
from small_programs import SmallProgram

from penumbra.actors.machine.config import MachineConfig
from penumbra.guest.kernel.balloon import Balloon
from penumbra.guest.kernel.frames import Frames
from penumbra.guest.threads import GuestCoroutine
from penumbra.guest.workloads.verify import WORD
from penumbra.guest.workloads.workload import named_workload
from penumbra.hw.formats import CR0_PE, CR0_PG, PAGE_BYTES, A, P, W
from penumbra.hw.operations import Invlpg, Load, LoadControl, ReleaseFrame, Store

pytestmark = pytest.mark.shows("V3")

THRASH = named_workload("swap-thrash", processes=2, threads=2, pages=32, rounds=2)
LENDING: dict[str, Any] = {"balloon_frames": 64, "timer_period": 700}
SHORT: dict[str, Any] = {"user_frames": 40, "disk_mib": 1, "disk_latency": 700}


class Lender(BareGuest):
    """A guest that goes on after a page fault."""

    def page_fault(self, vcpu_id: int, thread_id: int, gva: int, error: int) -> GuestCoroutine:
        self._threads[thread_id].refused = True
        return self._note(vcpu_id, gva)


@pytest.mark.shows("S3", "C5")
@pytest.mark.parametrize(
    "config", [{}, SHORT, {"guest_flush": "lazy"}], ids=["much", "short", "lazy"]
)
def test_a_guest_that_lends_frames_runs_alike_under_every_scheme(config: dict[str, Any]) -> None:
    left = set()
    for scheme in FAMILIES:
        machine, summary, verdict = run_machine(THRASH, scheme, **LENDING, **config)
        assert verdict is not None
        assert verdict.coherent, f"{scheme}: {verdict.explain()}"
        assert summary["ended"] == "finished"
        assert summary["counters"]["frames_released"] == machine.kernel.balloon.n_released > 40
        digests = tuple((p["pid"], p["ended"], p["digest"]) for p in summary["processes"])
        left.add((summary["progress"], digests))
    assert len(left) == 1


@pytest.mark.parametrize("scheme", ["shootdown", "patch", "vtlb", "nested"])
def test_what_is_lent_need_not_go_to_the_kernels_disk(scheme: str) -> None:
    frames: dict[str, Any] = {"host_frames": 80, "vcpus": 2}
    native = run_machine(THRASH, "native", vcpus=2, **LENDING)[1]
    _, summary, verdict = run_machine(THRASH, scheme, **LENDING, **frames)
    assert verdict is not None
    assert verdict.coherent, verdict.explain()
    assert summary["progress"] == native["progress"]
    assert summary["counters"]["host_zero_drop"] >= summary["counters"]["frames_released"] // 2
    idle = run_machine(THRASH, scheme, timer_period=700, **frames)[1]
    assert idle["counters"].get("frames_released", 0) == 0


@pytest.mark.parametrize("scheme", FAMILIES)
def test_a_released_page_holds_zeros(scheme: str) -> None:
    page, other = 0x5000, 0x6000
    seen = []

    async def lend() -> None:
        await Store(page, WORD, 7)
        await Store(other, WORD, 8)
        seen.append(await ReleaseFrame(page + 0x123))
        seen.extend([await Load(page, WORD), await Load(other, WORD)])
        await Store(page, WORD, 9)
        seen.extend([await Load(page, WORD), await ReleaseFrame(1 << 30)])

    run_bare(BareGuest([lend]), scheme)
    assert seen == [1, 0, 8, 9, 0]


@pytest.mark.parametrize(
    ("scheme", "moves"),
    [(scheme, False) for scheme in FAMILIES] + [(scheme, True) for scheme in FAMILIES[1:]],
)
def test_a_released_page_table_maps_nothing_after_the_next_flush(scheme: str, moves: bool) -> None:
    directory, table, at = 0x1000, 0x2000, 0x40_5000
    seen = []

    async def lend() -> None:
        for page in range(16):
            await Store(0x3000 + 4 * page, 4, page << 12 | A | W | P)
        await Store(table + 4 * 5, 4, 5 << 12 | A | W | P)
        await Store(directory, 4, 0x3000 | A | W | P)
        await Store(directory + 4, 4, table | A | W | P)
        await Store(0x5000, 4, 77)
        await LoadControl(3, directory)
        await LoadControl(0, CR0_PE | CR0_PG | 1 << 4)
        seen.append(await Load(at, 4))
        await ReleaseFrame(table)
        await Invlpg(at)
        await Load(at, 4)
        await Store(table + 4 * 5, 4, 5 << 12 | A | W | P)
        seen.append(await Load(at, 4))

    guest = Lender([lend])
    machine = run_bare(guest, scheme, host_moves=10 if moves else 0)
    assert seen == [77, 77]
    assert [what for _, what, _ in guest.traps] == [at]
    machine.memory.check()


@pytest.mark.parametrize("scheme", ["native", "patch"])
def test_a_program_cannot_release_a_frame(scheme: str) -> None:
    async def main() -> None:
        await ReleaseFrame(PAGE_BYTES)

    program = SmallProgram("lender", (main,))
    _, summary, _ = run_machine(workload_of(program), scheme, vcpus=1)
    assert "general protection fault" in summary["processes"][0]["ended"]
    assert "frames_released" not in summary["counters"]


def test_the_kernel_takes_back_what_it_needs() -> None:
    frames = Frames(8, 24)
    balloon = Balloon(frames, 16)
    frames.reclaim = lambda: balloon.give_back(len(balloon))
    for _ in range(5):
        ticking = balloon.tick()
        while True:
            try:
                ticking.send(None)
            except StopIteration:
                break
    assert (len(balloon), frames.n_free) == (10, 14)
    taken = [frames.take() for _ in range(24)]
    assert len(balloon) == 0
    for gfn in taken:
        frames.drop(gfn)
    frames.check()
    balloon.check()


def test_a_negative_balloon_is_refused() -> None:
    problem = MachineConfig(balloon_frames=-1).problem()
    assert problem == "machine.balloon_frames is -1: must not be negative"
