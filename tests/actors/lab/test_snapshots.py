"""Whole page tables: a kernel's own, and small ones of every format with their list written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from penumbra.actors.lab.files import FileRefusedError
from penumbra.actors.lab.snapshots import check_walk
from penumbra.hw.formats import CR4_PAE, CR4_PSE, EFER_NXE, NX, PCD, PS, PWT, A, D, G, P, U, W

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "walk_sample_ia32.npz"
Arrays = dict[str, npt.NDArray[Any]]
Rows = list[tuple[int, int, int]]


def sample() -> Arrays:
    with np.load(SAMPLE) as file:
        return {name: file[name] for name in file.files}


def snapshot(
    mode: str, cr3: int, cr4: int, tables: dict[int, dict[int, int]], rows: Rows, efer: int = 0
) -> Arrays:
    """Return one snapshot of one CPU: tables as frame -> index -> entry, and what they map."""
    dtype = "<u4" if mode == "2level" else "<u8"
    pages = np.zeros((len(tables), 4096), np.uint8)
    for page, entries in zip(pages, tables.values(), strict=True):
        for index, entry in entries.items():
            page.view(dtype)[index] = entry
    cpu = {"mode": mode, "cr0": 1 << 31, "cr3": cr3, "cr4": cr4, "efer": efer, "cpl": 0}
    meta = json.dumps([{"ram_bytes": 1 << 24, "cpus": [cpu]}]).encode()
    linear, phys, flags = zip(*rows, strict=True)
    return {
        "meta": np.frombuffer(meta, np.uint8),
        "s0_frames": np.array(list(tables), np.uint32),
        "s0_pages": pages,
        "s0_cpu0_linear": np.array(linear, np.uint64),
        "s0_cpu0_phys": np.array(phys, np.uint64),
        "s0_cpu0_flags": np.array(flags, np.uint16),
    }


TWO_LEVEL = snapshot(
    "2level", 0x7008, CR4_PSE,
    {
        7: {0: 9 << 12 | P | W, 1023: 5 << 22 | 3 << 13 | P | PS | U, 2: PS, 3: 0x44 << 12 | P},
        9: {1023: 0xABCDE << 12 | P | W | U | PWT | PCD | A | D | PS | G},
    },
    # The frame of entry 3's table is not in the file: it maps nothing.
    [(0x3F_F000, 0xABCD_E000, 0xBF), (0xFFC0_0000, 3 << 32 | 5 << 22, 0x42)],
)  # fmt: skip
WITHOUT_PSE = snapshot(
    "2level", 0x7000, 0, {7: {1: 9 << 12 | P | PS}, 9: {0: 3 << 12 | P}}, [(0x40_0000, 0x3000, 0)]
)
PAE = snapshot(
    "pae", 0x70E0 | 0x1F, CR4_PAE,
    {
        7: {28: 0x55 << 12, 29: 9 << 12 | P, 31: 8 << 12 | P},
        8: {511: 0x1_2340_0000 | 1 << 12 | P | W | PS | NX},
        9: {1: 10 << 12 | P | U},
        10: {2: 0xF_FFFF_F000 | P | NX | D, 3: 5},
    },
    [(0x4020_2000, 0xF_FFFF_F000, 0x120), (0x4020_3000, 0, 2), (0xFFE0_0000, 0x1_2340_0000, 0x141)],
    EFER_NXE,
)  # fmt: skip
FOUR_LEVEL = snapshot(
    "4level", 0x3000, CR4_PAE,
    {
        3: {0: 4 << 12 | P, 256: 4 << 12 | P | W, 511: 5 << 12 | P},
        4: {0: 1 << 30 | P | PS | G, 1: 6 << 12 | P},
        5: {511: 6 << 12 | P},
        6: {0: 7 << 12 | P, 1: 2 << 21 | P | W | PS},
        7: {511: 8 << 12 | P | U | A},
    },
    [
        (0, 1 << 30, 0xC0), (0x401F_F000, 0x8000, 0x12), (0x4020_0000, 2 << 21, 0x41),
        (0xFFFF_8000_0000_0000, 1 << 30, 0xC0), (0xFFFF_8000_401F_F000, 0x8000, 0x12),
        (0xFFFF_8000_4020_0000, 2 << 21, 0x41),
        (0xFFFF_FFFF_C01F_F000, 0x8000, 0x12), (0xFFFF_FFFF_C020_0000, 2 << 21, 0x41),
    ],
)  # fmt: skip
MADE = {"2level": TWO_LEVEL, "no PSE": WITHOUT_PSE, "pae": PAE, "4level": FOUR_LEVEL}


def saved(path: Path, arrays: Arrays) -> Path:
    np.savez(path / "walk.npz", **arrays)  # type: ignore[arg-type]
    return path / "walk.npz"


@pytest.mark.shows("H2")
def test_the_mappings_of_a_running_kernel_are_exactly_its_list() -> None:
    report = check_walk(SAMPLE)
    assert (report.n_snapshots, report.n_cpus, report.n_leaves) == (2, 4, 18722)
    assert report.failures == []


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("name", MADE)
def test_tables_of_every_mode_map_what_their_list_says(tmp_path: Path, name: str) -> None:
    report = check_walk(saved(tmp_path, MADE[name]))
    assert (report.failures, report.n_leaves) == ([], len(MADE[name]["s0_cpu0_linear"]))


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("name", MADE)
def test_every_wrong_missing_and_invented_mapping_is_named(tmp_path: Path, name: str) -> None:
    for row in range(len(MADE[name]["s0_cpu0_linear"])):
        for column in ("phys", "flags"):
            changed = MADE[name][f"s0_cpu0_{column}"].copy()
            changed[row] ^= 2
            arrays = MADE[name] | {f"s0_cpu0_{column}": changed}
            report = check_walk(saved(tmp_path, arrays))
            linear = int(arrays["s0_cpu0_linear"][row])
            assert [failure.linear for failure in report.failures] == [linear]
    columns = [f"s0_cpu0_{column}" for column in ("linear", "phys", "flags")]
    cut = MADE[name] | {column: MADE[name][column][1:] for column in columns}
    (missing,) = check_walk(saved(tmp_path, cut)).failures
    assert missing.difference.endswith("the file says no mapping")
    more = MADE[name] | {
        column: np.append(MADE[name][column], np.array([at]).astype(MADE[name][column].dtype))
        for column, at in zip(columns, (0x12_3000, 0x12_3000, 0), strict=True)
    }
    (invented,) = check_walk(saved(tmp_path, more)).failures
    assert (invented.snapshot, invented.cpu, invented.linear) == (0, 0, 0x12_3000)
    assert invented.difference.startswith("found no mapping, the file says 0x123000")


def _endless() -> Arrays:
    """Return four levels of one table that is full of itself: 2**36 leaves."""
    table = {3: dict.fromkeys(range(512), 3 << 12 | P)}
    return snapshot("4level", 0x3000, CR4_PAE, table, [(0, 0, 0)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop("meta"), "meta: missing"),
        (lambda a: a.update(meta=a["meta"][:-3]), "meta: "),
        (lambda a: a.update(meta=np.frombuffer(b"[]", np.uint8)), "meta: holds no snapshot"),
        (lambda a: a.pop("s1_pages"), "s1_pages: missing"),
        (lambda a: a.update(s0_pages=a["s0_pages"][:, :9]), "s0_pages: has shape (20, 9)"),
        (lambda a: a.update(s0_frames=a["s0_frames"] * 0), "s0_frames: frame 0x0 stands twice"),
        (lambda a: a["s0_frames"].__setitem__(3, 1 << 28), "s0_frames: frame 0x10000000 is beyond"),
        (lambda a: a.update(s1_cpu0_phys=a["s1_cpu0_phys"][1:]), "s1_cpu0_phys: has shape (4537,)"),
        (lambda a: a.update(s1_cpu1_flags=a["s1_cpu1_linear"]), "s1_cpu1_flags: holds uint64"),
        (lambda a: a.update(_endless()), "s0_frames: CPU 0: more than"),
    ],
)
def test_a_file_that_holds_no_snapshots_is_refused(
    tmp_path: Path, change: Callable[[Arrays], None], says: str
) -> None:
    arrays = sample()
    change(arrays)
    with pytest.raises(FileRefusedError) as refused:
        check_walk(saved(tmp_path, arrays))
    assert str(refused.value).startswith(says)
