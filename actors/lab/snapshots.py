"""A running kernel's page tables: every mapping in them, compared with the complete list of them.

The list is made twice and both must agree: by reading the tables level by level, and by letting the
MMU's own walker translate each address found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from penumbra.actors.lab.files import Array, FileRefusedError, read_arrays
from penumbra.hw import mmu_layout as m
from penumbra.hw.compiled import kernels_for
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.formats import (
    CR4_PSE,
    EFER_NXE,
    FORMATS,
    PAGE_BYTES,
    PAGE_SHIFT,
    FormatSpec,
)
from penumbra.hw.leaves import Leaves, TooManyTablesError, list_leaves
from penumbra.hw.memory import Ram
from penumbra.hw.tlb import Tlb, TlbGeometry

MODES = {"2level": "ia32", "pae": "pae", "4level": "x86-64"}
# Entry bit to flag bit: W U PWT PCD A D, then G over the large bit, then NX.
FLAGS = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 8: 7, 63: 8}
LARGE_FLAG = 1 << 6
_MOST_FRAMES = 1 << 28
_COLUMNS = ("linear", "phys", "flags")


class _Cpu(msgspec.Struct, frozen=True):
    mode: str
    cr3: int
    cr4: int
    cr0: int = 0
    efer: int = 0
    cpl: int = 0


class _Meta(msgspec.Struct, frozen=True):
    ram_bytes: int
    cpus: list[_Cpu]


class Failure(NamedTuple):
    """A mapping that differs: whose, at which linear address, and how."""

    snapshot: int
    cpu: int
    linear: int
    difference: str


@dataclass
class Report:
    """What became of a file: `n_leaves` mappings of `n_cpus` CPUs in `n_snapshots` snapshots."""

    n_snapshots: int = 0
    n_cpus: int = 0
    n_leaves: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures


class _Tables(NamedTuple):
    """The tables of one snapshot, by ascending frame."""

    frames: npt.NDArray[np.uint32]
    pages: npt.NDArray[np.uint8]


def check_walk(path: Path) -> Report:
    """Compare every mapping of every CPU of every snapshot.

    Raises:
        FileRefusedError: The file is damaged or holds something else.
    """
    arrays = read_arrays(path, lambda name: name == "meta" or name.startswith("s"))
    report = Report()
    for s, snapshot in enumerate(_meta(arrays)):
        tables = _tables(arrays, s)
        report.n_snapshots += 1
        for c, cpu in enumerate(snapshot.cpus):
            spec = _format(s, c, cpu)
            listed = _listed(arrays, f"s{s}_cpu{c}")
            report.n_cpus += 1
            report.n_leaves += len(listed[0])
            try:
                leaves = list_leaves(spec, cpu.cr3, *tables, pse=bool(cpu.cr4 & CR4_PSE))
            except TooManyTablesError as error:
                raise FileRefusedError(f"s{s}_frames", f"CPU {c}: {error}") from None
            found = (leaves.linear, leaves.physical, flags_of(leaves))
            for linear, text in _differences(found, listed):
                report.failures.append(Failure(s, c, linear, text))
            for linear, text in _walked(spec, cpu, tables, leaves):
                report.failures.append(Failure(s, c, linear, text))
    return report


def flags_of(leaves: Leaves) -> npt.NDArray[np.uint16]:
    """Return the leaves' own flags as the format of the file numbers them."""
    flags = np.where(leaves.level > 0, np.uint16(LARGE_FLAG), np.uint16(0))
    for bit, flag in FLAGS.items():
        flags |= ((leaves.entry >> np.uint64(bit) & np.uint64(1)) << np.uint64(flag)).astype("u2")
    return flags


# ---- what the file holds ----------------------------------------------------------------------


def _meta(arrays: dict[str, Array]) -> list[_Meta]:
    if "meta" not in arrays:
        raise FileRefusedError("meta", "missing")
    try:
        found = msgspec.json.decode(arrays["meta"].astype(np.uint8).tobytes(), type=list[_Meta])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FileRefusedError("meta", str(error)) from None
    if not found:
        raise FileRefusedError("meta", "holds no snapshot")
    for s, snapshot in enumerate(found):
        if not snapshot.cpus:
            raise FileRefusedError("meta", f"snapshot {s} has no CPU")
    return found


def _format(s: int, c: int, cpu: _Cpu) -> FormatSpec:
    place = f"meta, snapshot {s}, CPU {c}"
    if cpu.mode not in MODES:
        raise FileRefusedError(place, f"mode {cpu.mode!r} is none of {', '.join(MODES)}")
    for name in ("cr3", "cr4", "efer"):
        if not 0 <= getattr(cpu, name) < 1 << 63:
            raise FileRefusedError(place, f"{name} is {getattr(cpu, name)}: no register's value")
    return FORMATS[MODES[cpu.mode]]


def _array(arrays: dict[str, Array], name: str, dtype: str, *shape: int) -> Array:
    """Return an array that must be there; a length of -1 is any."""
    if name not in arrays:
        raise FileRefusedError(name, "missing")
    array = arrays[name]
    wanted = tuple(n if k == -1 else k for n, k in zip(array.shape, shape, strict=False))
    if array.ndim != len(shape) or array.shape != wanted:
        raise FileRefusedError(name, f"has shape {array.shape}")
    if array.dtype != np.dtype(dtype):
        raise FileRefusedError(name, f"holds {array.dtype}, not {np.dtype(dtype)}")
    return array


def _tables(arrays: dict[str, Array], s: int) -> _Tables:
    name = f"s{s}_frames"
    frames = _array(arrays, name, "<u4", -1)
    pages = _array(arrays, f"s{s}_pages", "u1", len(frames), PAGE_BYTES)
    order = np.argsort(frames, kind="stable")
    frames = frames[order]
    twice = np.flatnonzero(frames[1:] == frames[:-1])
    if len(twice):
        raise FileRefusedError(name, f"frame {int(frames[twice[0]]):#x} stands twice")
    if len(frames) and frames[-1] >= _MOST_FRAMES:
        raise FileRefusedError(name, f"frame {int(frames[-1]):#x} is beyond 40 address bits")
    return _Tables(frames, pages[order])


def _listed(arrays: dict[str, Array], prefix: str) -> tuple[Array, Array, Array]:
    linear = _array(arrays, f"{prefix}_linear", "<u8", -1)
    phys = _array(arrays, f"{prefix}_phys", "<u8", len(linear))
    flags = _array(arrays, f"{prefix}_flags", "<u2", len(linear))
    order = np.argsort(linear, kind="stable")
    return linear[order], phys[order], flags[order]


# ---- comparison -------------------------------------------------------------------------------


def _differences(
    found: tuple[Array, Array, Array], listed: tuple[Array, Array, Array]
) -> Iterator[tuple[int, str]]:
    """Yield the address and the kind of each difference between two sorted lists."""
    if all(np.array_equal(a, b) for a, b in zip(found, listed, strict=True)):
        return
    here, there = _rows(found), _rows(listed)
    for linear in sorted({*here, *there}):
        a, b = here.get(linear, []), there.get(linear, [])
        if a != b:
            yield linear, f"found {_row_text(a)}, the file says {_row_text(b)}"


def _rows(columns: tuple[Array, Array, Array]) -> dict[int, list[tuple[int, int]]]:
    rows: dict[int, list[tuple[int, int]]] = {}
    for linear, phys, flags in zip(*(column.tolist() for column in columns), strict=True):
        rows.setdefault(linear, []).append((phys, flags))
    return rows


def _row_text(rows: list[tuple[int, int]]) -> str:
    return " and ".join(f"{phys:#x} flags {flags:#x}" for phys, flags in rows) or "no mapping"


def _walked(
    spec: FormatSpec, cpu: _Cpu, tables: _Tables, leaves: Leaves
) -> Iterator[tuple[int, str]]:
    """Yield each listed leaf that the MMU's walker, reading as a supervisor, finds elsewhere."""
    if not len(leaves.linear):
        return
    # Frame 0 is empty and stands for every table that is not in the file.
    ram = Ram(len(tables.frames) + 1)
    ram.array.reshape(-1, PAGE_BYTES)[1:] = tables.pages
    n_mapped = int(tables.frames[-1]) + 1
    frame_map = np.zeros(n_mapped, np.int64)
    frame_map[tables.frames] = np.arange(1, ram.n_frames)
    mmu = PhysicalCpu(0, spec, ram, Tlb(spec, TlbGeometry(4, 1, 0)))
    mmu.reg[m.R_PSE] = cpu.cr4 & CR4_PSE
    mmu.reg[m.R_NXE] = cpu.efer & EFER_NXE
    mmu.reg[m.R_MAPPED], mmu.reg[m.R_FRAMES] = 1, n_mapped
    root = cpu.cr3 & spec.root_mask
    mmu.reg[m.R_ROOT] = root
    for i in range(spec.root_registers):
        at = (int(frame_map[root >> PAGE_SHIFT]) << PAGE_SHIFT) | (root & (PAGE_BYTES - 1))
        mmu.reg[m.R_TOP + i] = int(ram.array64[(at >> 3) + i])
    gvas = leaves.linear.view(np.int64)
    frames = np.zeros(len(gvas), np.int64)
    kernels = kernels_for(spec)
    arguments: tuple[Any, ...] = (
        (ram.array64, ram.array32, mmu.registers, frame_map, gvas, frames)
        if kernels.compiled
        else (ram.i64, ram.u32, mmu.reg, frame_map.data, gvas.data, frames.data)
    )
    kernels.functions.list_frames(*arguments, len(gvas))
    # What lies behind a reserved bit is present, and translates nothing.
    differs = (frames != leaves.physical.view(np.int64) >> PAGE_SHIFT) & (frames != -2)
    for i in np.flatnonzero(differs).tolist():
        there = f"at {int(frames[i]) << PAGE_SHIFT:#x}" if frames[i] >= 0 else "faults"
        linear, phys = int(leaves.linear[i]), int(leaves.physical[i])
        yield linear, f"the tables map it to {phys:#x}, the walker's read {there}"
