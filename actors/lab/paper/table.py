"""The whole table: every figure in the order of its row."""

from __future__ import annotations

from collections.abc import Container, Iterable

from penumbra.actors.lab.paper import rows, shootdowns
from penumbra.actors.lab.paper.figures import Figure
from penumbra.actors.lab.paper.runs import Run

SOURCES: dict[str, str] = {
    "R1": "Adams, Agesen, ASPLOS 2006: nanobenchmark pgfault",
    "R2": "Adams, Agesen, ASPLOS 2006: nanobenchmark ptemod",
    "R3": "Adams, Agesen, ASPLOS 2006: nanobenchmark divzero",
    "R4": "Adams, Agesen, ASPLOS 2006: nanobenchmarks syscall, in, call+ret",
    "R5": "Adams, Agesen, ASPLOS 2006: forkwait, 40,000 times",
    "R6": "Xen, out-of-sync L1 shadows, 2008: build times of a driver kit",
    "R7": "Xen, fast emulation of shadow writes: SMP kernel build",
    "R8": "VMware, performance of EPT, 2009",
    "R9": "Selective hardware/software memory virtualization, VEE 2011",
    "R10": "Agile paging, ISCA 2016",
    "R11": "LATR, ASPLOS 2018",
    "R12": "Don't shoot down TLB shootdowns, EuroSys 2020",
    "R13": "HATRIC, ISCA 2017",
    "R14": "Page recycling against shootdowns, arXiv 2409.10946",
    "R15": "AMD INVLPGB patches for Linux, 2024: tlb_flush2_threads",
}


def figures() -> list[Figure]:
    """Return every figure, by row."""
    found = [
        *rows.calibrated(), *rows.guest_os(), *rows.nanobenchmarks(), *rows.fork_and_wait(),
        *rows.out_of_sync(), *rows.nested(), *shootdowns.lazily(), *shootdowns.in_hardware(),
    ]  # fmt: skip
    order = list(SOURCES)
    return sorted(found, key=lambda figure: order.index(figure.row))


def needed(chosen: Iterable[Figure], schemes: Container[str]) -> list[Run]:
    """Return the runs of all figures whose schemes are there, each once."""
    runs = (run for figure in chosen if not figure.missing(schemes) for run in figure.runs)
    return list(dict.fromkeys(runs))
