"""Recorded accesses under every scheme, and what becomes of files that lie or are none."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from machines import FAMILIES

from penumbra.actors.lab.files import FileRefusedError
from penumbra.actors.lab.mmu_cases import (
    CROSSES,
    FETCH,
    HAS_PTE_A,
    HAS_PTE_B,
    LOCK_XOR,
    READ,
    WRITE,
    XCHG,
    Case,
    MmuCases,
    check_mmu,
    read_cases,
)
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.hw.formats import CR0_PG, CR4_PSE, PS, A, D, P, U, W

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "mmu_cases_sample.npz"
SCHEMES = FAMILIES
RESULTS = tuple(name for name in Case._fields[13:])
LINK = P | W | U
Columns = dict[str, npt.NDArray[np.int64]]


def hashed(gpa: int) -> int:
    return (gpa >> 2) * 0x9E3779B1 & 0xFFFF_FFFF


def small_page(linear: int, kind: int, size: int, operand: int = 0, **more: int) -> Case:
    """Return a permitted access through one small page, or two, as the manual says it ends."""
    fields = dict.fromkeys(Case._fields, 0) | {
        "cr0": CR0_PG | 1, "cr3": 0x40_0000, "cpl": 3, "linear": linear, "kind": kind,
        "size": size, "operand": operand, "flags": HAS_PTE_A, "pde_a": 0x41_0000 | LINK,
        "pte_a": 0x123_4000 | LINK, "phys_a": 0x123_4000 | linear & 0xFFF,
        "pde_a_after": 0x41_0000 | LINK | A, "pte_a_after": 0x123_4000 | LINK | A,
        "value": operand,
    }  # fmt: skip
    return Case(**(fields | more))


CROSSING = {
    "flags": CROSSES | HAS_PTE_A | HAS_PTE_B, "pde_b": 0x41_0000 | LINK,
    "pte_b": 0x567_8000 | LINK, "phys_b": 0x567_8000, "pde_b_after": 0x41_0000 | LINK | A,
}  # fmt: skip
BOTH_WRITTEN = {"pte_a_after": 0x123_4000 | LINK | A | D, "pte_b_after": 0x567_8000 | LINK | A | D}
BEYOND = 0xAB << 13  # bits 39:32 of a large page's address
BIG = {"cr4": CR4_PSE, "pte_a": 0, "pte_a_after": 0}


@pytest.mark.shows("H2", "S3")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_recorded_access_passes_under_every_scheme(scheme: str) -> None:
    report = check_mmu(SAMPLE, PRESETS[scheme])
    assert (report.scheme, report.n_cases) == (scheme, 2000)
    assert (report.failures, report.stray) == ([], [])


@pytest.mark.shows("H2")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_accesses_that_no_recording_holds_end_as_the_manual_says(scheme: str) -> None:
    large = 0x100_0000 | BEYOND | LINK | PS
    cases = [
        small_page(0x1FFD, FETCH, 6, **CROSSING, pte_b_after=0x567_8000 | LINK | A)._replace(
            value=0x123_4FFD
        ),
        small_page(0x1FFE, WRITE, 4, 0x8765_4321, **CROSSING, **BOTH_WRITTEN),
        small_page(0x1FFF, LOCK_XOR, 2, 0xBEEF, **CROSSING, **BOTH_WRITTEN),
        small_page(0x1004, XCHG, 2, 0xAAAA_BBBB, pte_a_after=0x123_4000 | LINK | A | D)._replace(
            value=0xAAAA_0000 | hashed(0x123_4004) & 0xFFFF
        ),
        # Beyond RAM: all ones are read, and what is stored vanishes.
        small_page(0x1000, READ, 4, **BIG)._replace(
            flags=8, pde_a=large, pde_a_after=large | A, phys_a=0xAB_0100_1000, value=0xFFFF_FFFF
        ),
        small_page(0x1000, LOCK_XOR, 4, 5, **BIG)._replace(
            flags=8, pde_a=large, pde_a_after=large | A | D, phys_a=0xAB_0100_1000
        ),
        # Its directory is its only table, and CR3 has bits that count for nothing.
        small_page(0x40_2000, READ, 4)._replace(
            pde_a=0x40_0000 | LINK, pte_a=0x150_0000 | LINK, phys_a=0x150_0000,
            pde_a_after=0x40_0000 | LINK | A, pte_a_after=0x150_0000 | LINK | A,
            value=hashed(0x150_0000), cr3=0x40_0018,
        ),
    ]  # fmt: skip
    report = MmuCases(PRESETS[scheme]).run(cases)
    assert (report.failures, report.stray) == ([], [])


@pytest.mark.shows("H2")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_wrong_value_of_a_file_is_found_in_its_case_alone(scheme: str) -> None:
    cases = read_cases(SAMPLE)[:400]
    machine = MmuCases(PRESETS[scheme])
    for name in RESULTS:
        wrong = list(cases)
        loose = name.endswith("_after")  # after a fault these may differ, in A and D
        at = next(
            i
            for i, case in enumerate(cases)
            if (not case.fault if loose or name in ("phys_a", "phys_b", "value") else case.fault)
        )
        bit = 1 if name == "fault" else 0x40
        wrong[at] = cases[at]._replace(**{name: getattr(cases[at], name) ^ bit})
        assert [failure.case for failure in machine.run(wrong).failures] == [at], name


@pytest.mark.shows("H2")
def test_only_a_and_d_may_be_set_by_an_access_that_faults() -> None:
    # The second page is missing: A of all three entries read, D of the first page's.
    crossing = CROSSING | {"phys_b": 0, "pte_b": 0, "pde_b_after": 0x41_0000 | LINK}
    case = small_page(0x1FFE, WRITE, 4, **crossing)._replace(
        fault=1, error=6, cr2=0x2000, phys_a=0, value=0
    )
    machine = MmuCases(PRESETS["native"])
    assert machine.case(case) == []
    assert machine.case(case._replace(cr2=0x1FFE)) == ["CR2 is 0x2000, expected 0x1ffe"]
    assert machine.case(case._replace(error=7)) == ["error code is 0x6, expected 0x7"]
    assert machine.case(case._replace(fault=0)) == [
        "a page fault with error 0x6 at 0x2000, expected no fault"
    ]


@pytest.mark.shows("H2")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_that_no_case_should_have_changed_is_reported(scheme: str) -> None:
    machine = MmuCases(PRESETS[scheme])
    for gpa in (0x40_0008, 0x777_7778):
        machine.ram.store(int(machine.frame_map[gpa >> 12]) << 12 | gpa & 0xFFF, 1, 0xA5)
    report = machine.run([small_page(0x1000, READ, 4)._replace(value=hashed(0x123_4000))])
    assert report.failures == []
    assert report.stray == [0x40_0008, 0x777_7778]
    assert not report.passed


def saved(path: Path, change: Callable[[Columns], None]) -> Path:
    with np.load(SAMPLE) as file:
        columns: Columns = {name: file[name][:50].astype(np.int64) for name in file.files}
    change(columns)
    np.savez(path, **columns)  # type: ignore[arg-type]
    return path


def replaced(name: str, row: int, value: int) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[name][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("cr2"), "arrays: cr2 missing"),
        (lambda c: c.update(cr3=c["cr3"][:9]), "cr3: has shape (9,), `linear` has (50,)"),
        (lambda c: c.update({k: v[:0] for k, v in c.items()}), "linear: has shape (0,)"),
        (lambda c: c.update(error=c["error"] * 0.5), "error: holds float64, not integers"),
        (replaced("kind", 7, 6), "case 7: kind is 6: not 0 .. 5"),
        (replaced("cpl", 2, -1), "case 2: cpl is -1: not 0 .. 3"),
        (replaced("size", 2, 0), "case 2: an access of kind"),
        (replaced("size", 2, 3), "case 2: an access of kind"),
        (replaced("cr0", 4, 1), "case 4: cr0 is 0x1: paging is off"),
        (replaced("flags", 0, 0), "case 0: flags are 0x0, but 4 bytes at"),
        (replaced("cr3", 5, 0x80_0000), "case 5: pde_a lies at 0x8"),
        (replaced("pde_b", 0, 1), "case 0: pde_b is 0x1 and"),
    ],
)
def test_a_file_that_holds_no_cases_is_refused(
    tmp_path: Path, change: Callable[[Columns], None], says: str
) -> None:
    with pytest.raises(FileRefusedError) as refused:
        read_cases(saved(tmp_path / "cases.npz", change))
    assert str(refused.value).startswith(says)


def _object_array() -> bytes:
    file = io.BytesIO()
    np.savez(file, linear=np.array([{}], object), allow_pickle=True)
    return file.getvalue()


def _bare_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 and no more", SAMPLE.read_bytes()[:-30_000], _object_array(), _bare_array()],
    ids=["empty", "no zip", "cut", "pickle", "bare array"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cases.npz"
    path.write_bytes(content)
    with pytest.raises(FileRefusedError):
        read_cases(path)


def test_no_damaged_byte_ends_in_another_error(tmp_path: Path) -> None:
    whole = bytearray(SAMPLE.read_bytes())
    path = tmp_path / "cases.npz"
    for at in range(0, len(whole), 2999):
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        try:
            assert len(read_cases(path)) == 2000  # a byte that nobody reads
        except FileRefusedError:
            continue
