"""Guest write buffers in every order of small programs that store to tables by address.

The litmus sample under the preset, and for each fault that is a matter of order (EG2, EG5) a test
that fails with the switch, in some listed order, and passes without it in all.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from buffers import buffer_scheme
from litmus_tests import (
    PAGE_ONE,
    PAGE_TWO,
    PTE_ONE,
    PTE_TWO,
    SAMPLE,
    barrier,
    document,
    invlpg,
    one_test,
    read,
    set_entry,
    write,
)

from penumbra.actors.lab.litmus import Finding, LitmusRunner, Plan
from penumbra.actors.lab.mmu_cases import check_mmu
from penumbra.actors.vmm.schemes import WRITE_BUFFER, Scheme
from penumbra.guest.litmus import LitmusTest, read_tests

TESTS = read_tests(SAMPLE)
MMU_SAMPLE = SAMPLE.with_name("mmu_cases_sample.npz")
OLD, NEW = "0x10000", "0x12000"
ENTRY = "0x802004"  # where the guest sees the entry of page one: page two is the table itself
ENTRIES = {"0x1008": "0x2027", PTE_ONE: "0x10067", PTE_TWO: "0x2067"}

pytestmark = pytest.mark.usefixtures("plain_engine")


@pytest.fixture
def plain_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENUMBRA_ENGINE", "plain")


def explore(test: LitmusTest, scheme: Scheme, plan: Plan | None = None) -> Finding:
    return anyio.run(LitmusRunner(test, scheme).explore, plan or Plan())


def shootdown(folder: Path) -> LitmusTest:
    """A correct one: the entry is changed at CPU 0, and CPU 1, told of it, flushes."""
    said = document(
        [read(PAGE_TWO, "t", cpl=0), write(ENTRY, "0x12067", "w", cpl=0), barrier("told")],
        [read(PAGE_ONE, "a"), barrier("told"), invlpg(PAGE_ONE), read(PAGE_ONE, "b")],
        allowed=[["0x0", "ok", OLD, NEW], ["0x0", "ok", NEW, NEW]],
        entries=ENTRIES,
    )
    return one_test(folder, said)


@pytest.mark.shows("H10", "W2", "H5", "P5")
@pytest.mark.parametrize("test", TESTS, ids=[test.id for test in TESTS])
def test_every_order_of_the_sample_ends_as_the_architecture_permits(test: LitmusTest) -> None:
    finding = explore(test, WRITE_BUFFER)
    assert (finding.wrong, finding.objections, finding.cut) == ({}, [], False)


@pytest.mark.shows("W1", "W6", "H2")
@pytest.mark.parametrize("records", [1, 64])
def test_recorded_accesses_end_as_the_processor_ended_them(records: int) -> None:
    for marks in ("tables", "writable"):
        scheme = buffer_scheme(records=records, marks=marks, overflow="exit")
        report = check_mmu(MMU_SAMPLE, scheme)
        assert (report.n_cases, report.failures, report.stray) == (2000, [], [])


@pytest.mark.shows("W2", "W4", "EG2")
@pytest.mark.parametrize("options", [{}, {"records": 1}, {"overflow": "lost", "records": 1}])
def test_a_correct_shootdown_leaves_nothing_stale_in_any_order(
    options: dict[str, object], tmp_path: Path
) -> None:
    finding = explore(shootdown(tmp_path), buffer_scheme(**options))
    assert (finding.wrong, finding.objections) == ({}, [])
    assert len(finding.outcomes) == 2


@pytest.mark.shows("EG2")
def test_reading_the_own_buffer_alone_as_printed_leaves_the_other_cpu_stale(
    tmp_path: Path,
) -> None:
    finding = explore(shootdown(tmp_path), buffer_scheme(fault="own_buffer_only"))
    assert ("0x0", "ok", OLD, OLD) in finding.wrong
    assert finding.objections


def race(folder: Path) -> LitmusTest:
    """CPU 1 flushes at any moment after the store, without being told."""
    steps = [read(PAGE_ONE, "a"), invlpg(PAGE_ONE), read(PAGE_ONE, "b")]
    said = document(
        [read(PAGE_TWO, "t", cpl=0), write(ENTRY, "0x12067", "w", cpl=0)],
        steps,
        allowed=[["0x0", "ok", a, b] for a, b in ((OLD, OLD), (OLD, NEW), (NEW, NEW))],
        entries=ENTRIES,
    )
    return one_test(folder, said)


@pytest.mark.shows("EG5", "H10")
def test_a_record_later_than_its_store_loses_the_race_with_another_cpus_event(
    tmp_path: Path,
) -> None:
    test, late = race(tmp_path), buffer_scheme(fault="logged_late")
    right = explore(test, WRITE_BUFFER)
    assert (right.wrong, right.objections) == ({}, [])
    wrong = explore(test, late)
    assert wrong.objections
    # CPU 1 reads, CPU 0 stores, CPU 1 flushes before the record is there: and reads the old page.
    listed = (1, 0, 0, 1, 1)
    seen = anyio.run(LitmusRunner(test, late).replay, listed)
    assert seen.objections
    assert list(seen.outcomes) == [("0x0", "ok", OLD, OLD)]
    assert not anyio.run(LitmusRunner(test, WRITE_BUFFER).replay, listed).objections


@pytest.mark.shows("W3")
def test_between_store_and_event_the_old_translation_may_still_be_used(tmp_path: Path) -> None:
    outcomes = explore(race(tmp_path), WRITE_BUFFER).outcomes
    assert ("0x0", "ok", OLD, OLD) in outcomes  # the event came before the store
    said = document(
        [read(PAGE_TWO, "t", cpl=0), write(ENTRY, "0x12067", "w", cpl=0), barrier("told")],
        [read(PAGE_ONE, "a"), barrier("told"), read(PAGE_ONE, "b"), invlpg(PAGE_ONE),
         read(PAGE_ONE, "c")],
        allowed=[["0x0", "ok", OLD, OLD, NEW], ["0x0", "ok", NEW, NEW, NEW]],
        entries=ENTRIES,
    )  # fmt: skip
    finding = explore(one_test(tmp_path, said), WRITE_BUFFER)
    assert (finding.wrong, finding.objections) == ({}, [])
    assert ("0x0", "ok", OLD, OLD, NEW) in finding.outcomes


@pytest.mark.shows("W6", "EG7")
def test_the_monitors_own_stores_and_the_logged_ones_reach_the_same_reader(tmp_path: Path) -> None:
    said = document(
        [read(PAGE_TWO, "t", cpl=0), write(ENTRY, "0x11067", "w", cpl=0),
         set_entry(PTE_ONE, "0x12067"), barrier("told")],
        [read(PAGE_ONE, "a"), barrier("told"), invlpg(PAGE_ONE), read(PAGE_ONE, "b")],
        allowed=[["0x0", "ok", a, NEW] for a in (OLD, "0x11000", NEW)],
        entries=ENTRIES,
    )  # fmt: skip
    for order in ("correct", "no_coalescing"):
        finding = explore(one_test(tmp_path, said), buffer_scheme(order=order))
        assert (finding.wrong, finding.objections) == ({}, [])


@pytest.mark.shows("W2", "EP7")
def test_a_detached_table_is_not_linked_again_behind_its_log(tmp_path: Path) -> None:
    window = "0xC00008"  # page two's entry, seen under another directory entry than its own
    said = document(
        [read("0xC00000", "t", cpl=0), read(PAGE_ONE, "a"), read(PAGE_TWO, "b"),
         set_entry("0x1008", "0x0"), invlpg(PAGE_ONE), invlpg(PAGE_TWO),
         write(window, "0x12067", "w", cpl=0), set_entry("0x1008", "0x2027"),
         read(PAGE_ONE, "c"), read(PAGE_TWO, "d")],  # c links the table, d finds its leaf there
        allowed=[["0x0", OLD, "0x11000", "ok", OLD, NEW]],
        entries={"0x1008": "0x2027", "0x100c": "0x3027", "0x3000": "0x2067",
                 PTE_ONE: "0x10067", PTE_TWO: "0x11067"},
    )  # fmt: skip
    finding = explore(one_test(tmp_path, said), WRITE_BUFFER)
    assert (finding.wrong, finding.objections) == ({}, [])
