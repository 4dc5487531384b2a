"""The litmus runner: the sample and tests of our own, whole and broken machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from litmus_tests import (
    NO_PAGING,
    NO_WP,
    PAGE_ONE,
    PAGE_TWO,
    PDE,
    PTE_ONE,
    PTE_TWO,
    SAMPLE,
    WP,
    barrier,
    document,
    get_entry,
    invlpg,
    mov,
    one_test,
    read,
    set_entry,
    write,
    xchg_entry,
)
from machines import FAMILIES, scheme_with

from penumbra.actors.lab.litmus import Finding, Hardware, LitmusRunner, Plan, Way
from penumbra.actors.machine.coherence import BareHardware, Coherence, Monitored, ProducerRef
from penumbra.actors.machine.machine import Machine
from penumbra.actors.machine.seat import Seat
from penumbra.actors.runtime import ActorSystem, ScheduleMismatch
from penumbra.actors.vmm.schemes import PRESETS, Scheme
from penumbra.guest.litmus import LitmusTest, read_tests

SCHEMES = FAMILIES
TESTS = read_tests(SAMPLE)
BY_ID = {test.id: test for test in TESTS}
OLD, NEW, OTHER = "0x10000", "0x12000", "0x11000"
REMAP = set_entry(PTE_ONE, "0x12067")

pytestmark = pytest.mark.usefixtures("plain_engine")


@pytest.fixture
def plain_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENUMBRA_ENGINE", "plain")


def explore(
    test: LitmusTest, scheme: Scheme | str, plan: Plan | None = None, **how: Any
) -> Finding:
    """Run a test's orders; a string names a preset."""
    preset = PRESETS[scheme] if isinstance(scheme, str) else scheme
    return anyio.run(LitmusRunner(test, preset, **how).explore, plan or Plan())


@pytest.mark.shows("H5", "H6", "H7", "P5", "C1")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("test", TESTS, ids=[test.id for test in TESTS])
def test_every_order_of_the_sample_ends_as_the_architecture_permits(
    test: LitmusTest, scheme: str
) -> None:
    finding = explore(test, scheme)
    assert (finding.wrong, finding.objections, finding.cut) == ({}, [], False)
    assert finding.speculative == []
    assert finding.n_orders is not None
    assert finding.n_runs in (finding.n_orders, 2 * finding.n_orders, 3 * finding.n_orders)


def test_stale_outcomes_are_reached_where_nothing_flushes() -> None:
    reached = {
        test.id: all(finding.stale.values())
        for test in TESTS
        if (finding := explore(test, "native")).stale
    }
    assert len(reached) == 9
    assert all(reached.values())
    # Only hardware that does what ours need not: fault at once, or keep siblings apart.
    faulting = explore(BY_ID["rw-up-noflush"], "native").outcomes[OLD, "PF:0x7"]
    apart = explore(BY_ID["smt-invlpg-sibling"], "native").outcomes[OLD, OLD]
    assert (faulting.hardware, apart.hardware) == (Hardware.SPURIOUS, Hardware.TAGGED)
    assert explore(BY_ID["remap-noflush"], "patch").stale == {(OLD, OLD): True}
    assert explore(BY_ID["remap-noflush"], "shootdown").stale == {(OLD, OLD): False}


@pytest.mark.shows("H2", "G6", "V5")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("program", "outcome", "start"),
    [
        pytest.param(
            [write(PAGE_ONE, "0x7", "a", cpl=0), mov("cr0", WP), write(PAGE_ONE, "0x8", "b", cpl=0),
             read(PAGE_ONE, "c")],
            ["ok", "PF:0x3", "0x7"],
            {"cr0": NO_WP, "entries": {PDE: "0x2027", PTE_ONE: "0x10065"}},
            id="WP-counts-from-the-next-store-on",
        ),
        pytest.param(
            [read("0xc05000", "a"), mov("cr4", "0x0"), read("0xc05000", "b")],
            ["0x405000", "PF:0x4"],
            {"entries": {"0x100c": "0x4000e7"}},
            id="PSE-is-a-flush",
        ),
        pytest.param(
            [read(PAGE_ONE, "a"), mov("cr0", NO_PAGING), read("0x11000", "b"),
             write("0x2004", "0x12067", "c", cpl=0), mov("cr0", WP), read(PAGE_ONE, "d")],
            [OLD, OTHER, "ok", NEW],
            {},
            id="without-paging-addresses-are-physical-tables-included",
        ),
        pytest.param(
            [mov("cr0", NO_PAGING), mov("cr3", "0x7000"), mov("cr0", WP), read(PAGE_ONE, "a")],
            [NEW],
            {"entries": {"0x7008": "0x3027", "0x3004": "0x12067"}},
            id="a-root-loaded-without-paging-counts-with-it",
        ),
        pytest.param(
            [read(PAGE_ONE, "a"), xchg_entry(PTE_ONE, "0x12067", "0xffffffff", "b"),
             invlpg(PAGE_ONE), read(PAGE_ONE, "c"), get_entry("0x10000", "0xffffffff", "d")],
            [OLD, "0x10067", NEW, "0x10000"],
            {},
            id="an-exchange-is-a-store-and-any-frame-can-be-named",
        ),
        pytest.param(
            [read("0xc01ffe", "a"), write("0xc01ffe", "0x11223344", "b"), read("0xc01ffc", "c"),
             read("0xc02000", "d")],
            ["0x1", "ok", "0x33440ffc", "0x21122"],
            {"entries": {"0x100c": "0x2067", "0x2004": "0x10067", "0x2008": "0x20067"}},
            id="an-access-may-cross-a-page",
        ),
    ],
)  # fmt: skip
def test_one_cpu_has_one_outcome(
    program: list[Any], outcome: list[str], start: dict[str, Any], scheme: str, tmp_path: Path
) -> None:
    test = one_test(tmp_path, document(program, allowed=[outcome], **start))
    finding = explore(test, scheme)
    assert (list(finding.outcomes), finding.objections) == ([tuple(outcome)], [])


@pytest.mark.shows("H7")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_siblings_that_read_tables_differently_share_no_entry(scheme: str, tmp_path: Path) -> None:
    said = document(
        [barrier("x"), read("0xc05000", "a")],
        [read("0xc05000", "b"), barrier("x")],
        allowed=[["PF:0x4", "0x405000"]],
        entries={"0x100c": "0x4000e7"},
        smt_siblings=[[0, 1]],
    )
    said["init"]["cpus"] = [{**said["init"]["cpus"][0], "cr4": cr4} for cr4 in ("0x0", "0x10")]
    finding = explore(one_test(tmp_path, said), scheme)
    assert (list(finding.outcomes), finding.objections) == ([("PF:0x4", "0x405000")], [])


# ---- schedules -----------------------------------------------------------------------------------


def test_a_listed_schedule_repeats_its_outcome() -> None:
    test = BY_ID["mp-remote-noflush"]
    finding = explore(test, "patch")
    assert len(finding.outcomes) > 1
    for outcome, way in finding.outcomes.items():
        again = anyio.run(LitmusRunner(test, PRESETS["patch"]).replay, way.schedule)
        assert again.outcomes == {outcome: way}


def test_a_schedule_that_passes_a_barrier_is_refused() -> None:
    runner = LitmusRunner(BY_ID["mp-shootdown"], PRESETS["native"])
    with pytest.raises(ScheduleMismatch):
        anyio.run(runner.replay, (0, 0, 0, 1, 1, 1))


def test_drawn_schedules_follow_the_seed_and_a_bound_cuts() -> None:
    test = BY_ID["mp-remote-noflush"]
    drawn = [explore(test, "patch", Plan(n_random=6, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0].outcomes == drawn[1].outcomes
    assert [finding.n_runs for finding in drawn] == [6, 6, 6]
    assert not drawn[0].cut
    cut = explore(test, "patch", Plan(bound=2))
    assert (cut.cut, cut.n_runs, cut.passed) == (True, 2, True)


def test_enough_draws_reach_what_all_orders_reach() -> None:
    test = BY_ID["mp-remote-noflush"]
    drawn = explore(test, "native", Plan(n_random=60))
    assert set(drawn.outcomes) == set(explore(test, "native").outcomes)


# ---- broken machines -----------------------------------------------------------------------------


class _DeafHardware(BareHardware):
    def invlpg(self, gva: int) -> None:
        pass


class _DeafMonitor(Monitored):
    def invlpg(self, gva: int) -> None:
        pass


class _DeafMachine(Machine):
    """A machine that does nothing at INVLPG."""

    def _coherences(
        self, system: ActorSystem, seats: Sequence[Seat]
    ) -> tuple[list[Coherence], list[ProducerRef]]:
        made, producers = super()._coherences(system, seats)
        for one in made:
            if isinstance(one, BareHardware):
                one.__class__ = _DeafHardware
            elif isinstance(one, Monitored):
                one.__class__ = _DeafMonitor
        return made, producers


@pytest.mark.shows("C2")
@pytest.mark.parametrize("scheme", ["native", "patch"])
def test_a_machine_deaf_to_invlpg_shows_a_forbidden_outcome(scheme: str) -> None:
    finding = explore(BY_ID["remap-invlpg"], scheme, build=_DeafMachine, check=False)
    assert list(finding.wrong) == [(OLD, OLD)]
    assert finding.wrong[OLD, OLD] == Way((0, 0, 0, 0))
    assert not finding.passed


@pytest.mark.shows("C2")
def test_the_checker_objects_even_if_the_test_allows_everything(tmp_path: Path) -> None:
    said = document(
        [read(PAGE_ONE, "a"), REMAP, invlpg(PAGE_ONE), read(PAGE_ONE, "b")],
        allowed=[[OLD, OLD], [OLD, NEW]],
    )
    finding = explore(one_test(tmp_path, said), "patch", build=_DeafMachine)
    assert (finding.wrong, finding.passed) == ({}, False)
    [(way, text)] = finding.objections
    assert way.schedule == (0, 0, 0, 0)
    assert "the checker: " in text


@pytest.mark.shows("C2", "P4")
def test_an_unmarked_channel_loses_the_patch_that_an_event_left(tmp_path: Path) -> None:
    said = document(
        [read(PAGE_TWO, "a"), set_entry(PTE_TWO, "0x12067"), invlpg(PAGE_ONE), invlpg(PAGE_TWO),
         read(PAGE_TWO, "b")],
        allowed=[[OTHER, NEW]],
    )  # fmt: skip
    test = one_test(tmp_path, said)
    assert explore(test, "patch").passed
    broken = scheme_with("patch", order="left_unmarked")
    assert list(explore(test, broken, check=False).wrong) == [(OTHER, OTHER)]


@pytest.mark.shows("C2", "EP7", "P4")
def test_EP7_a_table_linked_again_as_it_was_shows_what_two_flushes_have_ended(
    tmp_path: Path,
) -> None:
    said = document(
        [read(PAGE_ONE, "a"), set_entry(PDE, "0x0"), invlpg(PAGE_TWO),
         set_entry(PTE_ONE, "0x12067"), invlpg(PAGE_ONE), set_entry(PDE, "0x2027"),
         read(PAGE_TWO, "b"), read(PAGE_ONE, "c")],
        allowed=[[OLD, OTHER, NEW]],
    )  # fmt: skip
    test = one_test(tmp_path, said)
    for preset in ("native", "native-patch", "patch", "patch-locked", "patch-shared"):
        assert explore(test, preset).passed, preset
    for preset in ("patch", "patch-locked", "patch-shared"):
        printed = scheme_with(preset, order="relink_as_is")
        assert list(explore(test, printed, check=False).wrong) == [(OLD, OTHER, OLD)], preset
        assert explore(test, printed).objections, preset
