"""From a configuration to a machine, and from a machine that has ended to its summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from penumbra.actors.check import Oracle
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.ground import Place
from penumbra.actors.machine.machine import Machine
from penumbra.actors.machine.observer import Taps
from penumbra.actors.runtime import Chooser
from penumbra.actors.vmm.schemes import Scheme
from penumbra.guest.kernel import Kernel, KernelOptions, Layout, default_layout
from penumbra.guest.system import GuestSystem
from penumbra.guest.workloads.workload import Workload
from penumbra.hw.costs import CostProfile
from penumbra.hw.formats import FORMATS, PAGE_SHIFT
from penumbra.hw.memory import Ram

MIB = 1 << 20


class ConfigurationError(ValueError):
    """A machine, scheme and workload that do not go together; the text names field and cause."""


def plan_layout(machine: MachineConfig, workload: Workload) -> Layout:
    """Lay out guest memory for a workload.

    Raises:
        ConfigurationError: It does not fit, or the program needs another paging format.
    """
    wanted = {32: ("ia32", "pae"), 64: ("x86-64",)}.get(workload.bits, (machine.paging,))
    if machine.paging not in wanted:
        raise ConfigurationError(
            f"machine.paging is {machine.paging!r}, but workload {workload.name!r} "
            f"is a {workload.bits}-bit program: it needs {' or '.join(map(repr, wanted))}"
        )
    program = workload.program
    try:
        return default_layout(
            FORMATS[machine.paging],
            program.peak_pages,
            program.used_ranges(),
            ram_bytes=machine.ram_mib * MIB,
            pool_bytes=machine.pool_mib * MIB,
        )
    except ValueError as error:
        raise ConfigurationError(f"machine: {error}") from error


def build_machine(
    machine: MachineConfig,
    scheme: Scheme,
    workload: Workload,
    costs: CostProfile,
    seed: int,
    *,
    check: bool = True,
    chooser: Chooser | None = None,
    place: Callable[[GuestSystem], Place] | None = None,
) -> tuple[Machine, Oracle | None]:
    """Put a machine together, with its checker unless declined.

    Args:
        place: Given its guest, where this VM of several lies.

    Raises:
        ConfigurationError: The parts do not go together.
    """
    for problem in (
        machine.problem(),
        scheme.problem(),
        scheme.machine_problem(machine.tlb),
    ):
        if problem:
            raise ConfigurationError(problem)
    layout = plan_layout(machine, workload)
    if not machine.max_progress:
        recorded = sum(stream.n_references for stream in workload.streams)
        machine = msgspec.structs.replace(machine, max_progress=10 * recorded + 20_000_000)
    oracles: list[Oracle] = []

    def make_taps(ram: Ram) -> Taps:
        oracles.append(Oracle(machine.spec_name, machine.vcpus, ram.bytes, ram.flags))
        return oracles[0]

    options = KernelOptions(
        timer_period=machine.timer_period,
        bugs=frozenset(machine.guest_bugs),
        swap_pages=machine.disk_mib * MIB >> PAGE_SHIFT,
        user_frames=machine.user_frames,
        balloon_frames=machine.balloon_frames,
        flush=_guest_flush(machine, scheme),
    )
    kernel = Kernel(FORMATS[machine.paging], layout, machine.vcpus, [workload.program], options)
    built = Machine(
        machine, scheme, kernel, workload.streams, costs, seed,
        make_taps if check else None, chooser,
        place=place(kernel) if place else None,
    )  # fmt: skip
    return built, oracles[0] if oracles else None


def _guest_flush(machine: MachineConfig, scheme: Scheme) -> str:
    """Return how the guest flushes: it announces changes where CPUs can hear of them."""
    announces = scheme.detect == "announced" and machine.guest_flush == "eager"
    return "patch" if announces else machine.guest_flush


def summarise(machine: Machine, seed: int) -> dict[str, Any]:
    """Return the deterministic summary of a machine that has ended."""
    observer, config = machine.observer, machine.config
    machine.devices.count()
    matrix = _matrix(machine)
    for producer, row in enumerate(matrix):
        for channel in row:
            observer.count(producer, "patch_posted", channel["n_posted"])
            observer.count(producer, "patch_coalesced", channel["n_coalesced"])
            observer.count(producer, "overflow", channel["n_overflows"])
        if machine.matrix.n_locks(producer):
            observer.count(producer, "patch_lock", machine.matrix.n_locks(producer))
    n = config.vcpus
    exits: dict[str, int] = {}
    for per_vcpu in observer.exits:
        for reason, count in per_vcpu.items():
            exits[reason] = exits.get(reason, 0) + count
    return {
        "scheme": machine.scheme.name,
        "seed": seed,
        "vcpus": n,
        "paging": config.paging,
        "ended": machine.ended,
        "progress": sum(observer.progress),
        "cost": sum(observer.cost(i) for i in range(n)),
        "counters": observer.totals(),
        "vcpu": [
            {
                "progress": observer.progress[i],
                "cost": observer.cost(i),
                **{k: observer.counters[i][k] for k in sorted(observer.counters[i])},
                **observer.hardware(i),
            }
            for i in range(n)
        ],
        "exits": {reason: exits[reason] for reason in sorted(exits)},
        "processes": [
            {
                "pid": record.pid,
                "name": record.name,
                "ended": record.ended,
                "pages": record.pages,
                "digest": record.digest,
            }
            for record in sorted(machine.ledger.records.values(), key=lambda r: r.pid)
        ],
        "matrix": matrix,
        "printed": machine.devices.printed(),
        "marks": [[what, list(args), text] for what, args, text in machine.ledger.marks[:1000]],
    }


def _matrix(machine: Machine) -> list[list[dict[str, int]]]:
    if machine.scheme.propagate != "patch":
        return []
    n = machine.config.vcpus
    return [
        [msgspec.to_builtins(machine.matrix.statistics(i, j)) for j in range(n)] for i in range(n)
    ]
