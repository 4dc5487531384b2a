"""Fill and Copy: page by page, restarting at the faulting byte, seen where a frame is flagged."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import operations as o
from penumbra.hw.exits import Done, PageFault
from penumbra.hw.formats import IA32

from .rig import ALL, PAGE, READ, WRITE, P, Rig, U

BASE, N_PAGES = 0x0040_0000, 4
FRAMES = [40, 50, 45, 47]


def seen(rig: Rig) -> bytearray:
    """Return the pages from BASE as a program sees them, mapped or not."""
    frames = rig.ram.array.reshape(-1, PAGE)
    return bytearray(b"".join(frames[pfn].tobytes() for pfn in FRAMES))


def filled(mapped: list[bool], flagged: list[bool]) -> Rig:
    """Return a machine whose pages hold a pattern; some are not there yet, some are flagged."""
    rig = Rig(IA32)
    for page, pfn in enumerate(FRAMES):
        rig.map(BASE + page * PAGE, pfn, ALL if mapped[page] else 0)
        rig.ram.array64[pfn << 9 : (pfn + 1) << 9] = range(page << 20, (page << 20) + 512)
        rig.ram.flags[pfn] = flagged[page]
    return rig


def run_through(rig: Rig, work: o.Fill | o.Copy) -> list[PageFault]:
    """Run to the end, mapping each page as it faults; return the faults."""
    faults: list[PageFault] = []
    at = 0
    for _ in range(2 * N_PAGES + 1):
        stop = rig.cpu.run(work, user=True, at=at)
        if stop == Done():
            return faults
        assert isinstance(stop, PageFault)
        faults.append(stop)
        at = stop.at
        page = (stop.gva - BASE) // PAGE
        rig.map(stop.gva & ~0xFFF, FRAMES[page], ALL if stop.kind == WRITE else P | U)
    raise AssertionError(f"no end: {faults}")


four = st.lists(st.booleans(), min_size=N_PAGES, max_size=N_PAGES)
words = st.integers(0, N_PAGES * 512)


@pytest.mark.shows("H1", "H2")
@settings(deadline=None, max_examples=120)
@given(mapped=four, flagged=four, first=words, n=words, value=st.integers(0, (1 << 64) - 1))
def test_a_fill_stores_every_word_once_however_often_it_faults(
    mapped: list[bool], flagged: list[bool], first: int, n: int, value: int
) -> None:
    n = min(n, N_PAGES * 512 - first)
    rig = filled(mapped, flagged)
    wanted = seen(rig)
    wanted[8 * first : 8 * (first + n)] = value.to_bytes(8, "little") * n
    faults = run_through(rig, o.Fill(BASE + 8 * first, 8 * n, value))
    assert seen(rig) == wanted
    touched = {word // 512 for word in range(first, first + n)}
    assert [fault.gva // PAGE - BASE // PAGE for fault in faults] == sorted(
        page for page in touched if not mapped[page]
    )
    assert all(fault.gva == BASE + 8 * first + fault.at for fault in faults)
    told = {word for word in range(first, first + n) if flagged[word // 512]}
    assert sorted(rig.flagged) == sorted(
        (FRAMES[w // 512] * PAGE + w % 512 * 8, 8, (w // 512 << 20) + w % 512, value) for w in told
    )


@pytest.mark.shows("H1", "H2")
@settings(deadline=None, max_examples=120)
@given(mapped=four, flagged=four, dst=words, src=words, n=words)
def test_a_copy_moves_word_by_word_upwards_however_often_it_faults(
    mapped: list[bool], flagged: list[bool], dst: int, src: int, n: int
) -> None:
    n = min(n, N_PAGES * 512 - max(dst, src))
    rig = filled(mapped, flagged)
    row = memoryview(seen(rig)).cast("Q")
    for i in range(n):
        row[dst + i] = row[src + i]  # overlapping upwards repeats, as REP MOVS does
    faults = run_through(rig, o.Copy(BASE + 8 * dst, BASE + 8 * src, 8 * n))
    assert seen(rig) == row.tobytes()
    for fault in faults:
        start = src if fault.kind == READ else dst
        assert fault.gva == BASE + 8 * start + fault.at
    assert len(rig.flagged) == sum(flagged[word // 512] for word in range(dst, dst + n))


@pytest.mark.shows("H2")
def test_a_fill_stopped_by_rights_has_stored_what_it_could() -> None:
    rig = filled([True] * N_PAGES, [False] * N_PAGES)
    rig.map(BASE + PAGE, FRAMES[1], P | U)
    fill = o.Fill(BASE + PAGE - 16, 32, 9)
    assert rig.cpu.run(fill, user=True) == PageFault(BASE + PAGE, 7, at=16, kind=WRITE)
    assert [int(word) for word in memoryview(seen(rig)).cast("Q")[510:514]] == [
        9, 9, 1 << 20, (1 << 20) + 1,
    ]  # fmt: skip
