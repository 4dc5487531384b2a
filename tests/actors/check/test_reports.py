"""What a violation says, as text, whole."""

from __future__ import annotations

import pytest

from penumbra.actors.check import Allowed, Verdict

from .rig import LINK, PSE, USED, WRITE, A, D, Rig, W

ROOT, PTE, PAGE = 0x1000, 0x4004, 0x1000


def two_level() -> Rig:
    rig = Rig("ia32")
    rig.hardware(ROOT, 0x4000 | LINK)
    rig.hardware(PTE, 0x8000 | USED)
    rig.start(ROOT, PSE)
    return rig


def told(rig: Rig) -> list[str]:
    """Return the violations' texts, counted from the guest's start (64 frames were granted)."""
    return [violation.explain() for violation in rig.oracle.verdict().violations]


@pytest.mark.shows("C1")
def test_a_use_after_the_flush_names_the_stores_and_the_flush_that_closed_the_entry() -> None:
    rig = two_level()
    rig.store(PTE, 0x9000 | USED)
    rig.oracle.event(0, "INVLPG", PAGE)
    assert rig.uses(PAGE + 0x123, 8, WRITE) == "wrong"
    (text,) = told(rig)
    assert text == (
        "#67 VCPU 0: write at 0x1123, user, CR0.WP=1\n"
        "  the frame is none of the allowed ones\n"
        "  used: machine frame 0x9, guest frame 0x8\n"
        "  allowed: machine frame 0x8, guest frame 0x9 wux AD (present tables: 0x4027 0x9067)\n"
        "  PDE at gpa 0x1000\n"
        "    0x4027 from #65 until now\n"
        "  PTE at gpa 0x4004\n"
        "    0x8067 from #65 to #66, closed by INVLPG(0x1000) #67 of VCPU 0\n"
        "    0x9067 from #66 until now"
    )


@pytest.mark.shows("C1")
def test_what_may_still_be_cached_is_listed_beside_the_present_translation() -> None:
    rig = two_level()
    rig.store(PTE, 0x9000 | (USED & ~W))
    assert rig.uses(PAGE, 10) == "wrong"
    (violation,) = rig.oracle.verdict().violations
    fresh = Allowed(9, 8, "-ux", accessed=True, dirty=True, entries=(0x4027, 0x9065), fresh=True)
    stale = Allowed(8, 9, "wux", accessed=True, dirty=True, entries=(0x4027, 0x8067), fresh=False)
    assert set(violation.allowed) == {fresh, stale}
    assert [value.closed for value in violation.history[1].values] == ["", ""]


@pytest.mark.shows("C1")
def test_a_fault_that_nothing_explains_is_told_with_what_the_tables_say() -> None:
    rig = two_level()
    rig.faults(PAGE, 5)
    rig.store(PTE, 0)
    rig.oracle.event(0, "INVLPG", PAGE)
    rig.faults(PAGE, 5)
    first, second = told(rig)
    assert first.startswith(
        "#65 VCPU 0: page fault on a read at 0x1000, user, CR0.WP=1\n"
        "  the present tables permit the access, and no cache may deny it\n"
        "  delivered: error code 0x5\n"
    )
    assert "  the present tables give error code 0x4\n" in second
    assert "  allowed: no translation\n" in second


def test_a_flush_is_told_of_that_is_too_long_ago_to_be_named() -> None:
    rig = two_level()
    rig.store(PTE, 0x9000 | USED)
    rig.oracle.event(0, "INVLPG", PAGE)
    for page in range(0x100, 0x200):
        rig.oracle.event(0, "INVLPG", page << 12)
    rig.uses(PAGE, 8)
    assert "from #65 to #66, closed by an event of VCPU 0 up to #67\n" in told(rig)[0]


@pytest.mark.shows("C1")
def test_missing_rights_and_missing_bits_have_their_own_words() -> None:
    rig = two_level()
    for bits, kind in ((USED & ~W, WRITE), (USED & ~A, 0), (USED & ~D, WRITE)):
        rig.hardware(PTE, 0x8000 | bits)
        rig.uses(PAGE, 8, kind)
    assert [violation.problem for violation in rig.oracle.verdict().violations] == [
        "no allowed translation by that frame has the rights, with A and D as needed",
        "A is not set in every entry used",
        "D is not set in the entry written through",
    ]


@pytest.mark.shows("C1")
def test_twenty_violations_are_described_and_all_are_counted() -> None:
    rig = two_level()
    for _ in range(25):
        rig.uses(PAGE, 9)
    verdict = rig.oracle.verdict()
    assert (verdict.n_violations, len(verdict.violations), verdict.coherent) == (25, 20, False)
    assert verdict.explain().startswith("NOT COHERENT: 25 references in 25 checks, 0 by older")


def test_the_same_run_gives_the_same_verdict() -> None:
    def run() -> Verdict:
        rig = two_level()
        rig.store(PTE, 0x9000 | USED)
        rig.store(ROOT, 0x5000 | LINK)
        rig.uses(PAGE, 11)
        rig.faults(PAGE, 0)
        return rig.oracle.verdict()

    assert run() == run()
    assert run().explain() == run().explain()
