"""Several VMs on one kernel, or one VM with more VCPUs than CPUs: building, running, summing up.

Every VM runs the workload for itself, with a seed of its own; VM 0 has the run's. Without a monitor
there is nothing that could hold guests apart, so under `native` each has hardware of its own; the
kernel's choices are the same, so that guests make the same progress under every scheme.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penumbra.actors.check import Oracle, Verdict
from penumbra.actors.machine.build import build_machine
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.ground import Place, frames_wanted
from penumbra.actors.machine.hardware import Hardware
from penumbra.actors.machine.host import Host
from penumbra.actors.machine.kernel import KernelServices
from penumbra.actors.machine.machine import Machine
from penumbra.actors.observe.events import EventLog
from penumbra.actors.vmm.compose import compose_buffer, monitor_frames
from penumbra.actors.vmm.memory import scattered
from penumbra.actors.vmm.residents import FramePool
from penumbra.actors.vmm.schemes import Scheme
from penumbra.guest.system import GuestSystem
from penumbra.guest.workloads.workload import Workload
from penumbra.hw.costs import CostProfile


@dataclass
class Rig:
    """VMs ready to run.

    Attributes:
        run: Runs them all to their ends; told a function to call once per turn of the loop.
        trespasses: Filled while they run: frames used that the kernel gave to another VM.
        kernel: What the kernel has done for them, if there is one.
    """

    machines: Sequence[Machine]
    oracles: Sequence[Oracle]
    events: EventLog
    run: Callable[[Callable[[], None] | None], Awaitable[None]]
    trespasses: Sequence[str] = ()
    kernel: KernelServices | None = None


def build_rig(
    config: MachineConfig,
    scheme: Scheme,
    workload: Workload,
    costs: CostProfile,
    seed: int,
    *,
    check: bool = True,
) -> Rig:
    """Build what a configuration asks for: one machine, or several VMs on one kernel.

    Raises:
        ConfigurationError: The parts do not go together.
    """
    shares = config.vms > 1 or 0 < config.cpus < config.vcpus
    if shares or config.applications or config.form == "hosted":
        return build_host(config, scheme, workload, costs, seed, check=check)
    machine, oracle = build_machine(config, scheme, workload, costs, seed, check=check)
    oracles = [] if oracle is None else [oracle]

    async def run(on_turn: Callable[[], None] | None) -> None:
        await machine.run(on_turn)

    return Rig([machine], oracles, machine.observer.events, run)


def build_host(
    config: MachineConfig,
    scheme: Scheme,
    workload: Workload,
    costs: CostProfile,
    seed: int,
    *,
    check: bool = True,
) -> Rig:
    """Put the VMs of one kernel together on shared hardware.

    Raises:
        ConfigurationError: The parts do not go together.
    """
    ground = _Ground(config, scheme, seed)
    built = [
        build_machine(
            config, scheme, workload, costs, seed + vm, check=check, place=ground.place(vm)
        )
        for vm in range(config.vms)
    ]
    machines = [machine for machine, _ in built]
    host = Host(ground.hardware, machines, config, seed)
    oracles = [oracle for _, oracle in built if oracle is not None]
    return Rig(machines, oracles, ground.events, host.run, host.trespasses, host.kernel)


class _Ground:
    """Hardware for VMs of one kind, built when the first of them says how much it takes.

    Attributes:
        hardware: What they share; None before, and for guests without a monitor.
    """

    def __init__(self, config: MachineConfig, scheme: Scheme, seed: int) -> None:
        self._config = config
        self._scheme = scheme
        self._seed = seed
        self._shared = scheme.shadow != "none"
        self._pool: FramePool | None = None
        self._shares: list[list[int]] = []
        self.hardware: Hardware | None = None
        self.events = EventLog()

    def place(self, vm: int) -> Callable[[GuestSystem], Place]:
        """Return what says where VM number `vm` lies, given its guest."""

        def placed(guest: GuestSystem) -> Place:
            if not self._shared:
                return Place(vm, self.events)
            if not self._shares:
                self._build(guest)
            return Place(vm, self.events, self.hardware, self._shares[vm], self._pool)

        return placed

    def _build(self, guest: GuestSystem) -> None:
        config, scheme = self._config, self._scheme
        n_each = frames_wanted(config, scheme, guest)
        n_monitor = monitor_frames(scheme, config.vcpus, guest.n_frames)
        n_frames = n_each * config.vms
        self.hardware = Hardware(
            config, n_frames, config.cpus or config.vcpus, buffer=compose_buffer(scheme)
        )
        if config.host_frames:
            self._pool = FramePool((), self.hardware.owner)
        own = scattered(range(n_frames), self._seed)
        for vm in range(config.vms):
            frames = sorted(own[vm * n_each : (vm + 1) * n_each])
            self.hardware.owner[frames] = vm
            self._shares.append(frames)
            if self._pool is not None:
                # Every VM brings its part; whose they are in the end is decided as they run.
                share = own[vm * n_each : (vm + 1) * n_each]
                self._shares[vm] = share[:n_monitor]
                for pfn in share[n_monitor:]:
                    self._pool.give(pfn)


def merge_summaries(
    parts: Sequence[dict[str, Any]], kernel: KernelServices, trespasses: Sequence[str]
) -> dict[str, Any]:
    """Return one summary of the VMs of a kernel: sums, and each VM's own rows with its number."""
    whole = dict(parts[0])
    ended = [part["ended"] for part in parts]
    whole["vms"] = len(parts)
    whole["trespasses"] = list(trespasses)
    whole["console"] = kernel.said
    routes = sorted(kernel.routes.items())
    whole["interrupts"] = [[kind, vec.value, way.value, n] for (kind, vec, way), n in routes]
    whole["ended"] = next((why for why in ended if why != "finished"), "finished")
    for key in ("progress", "cost"):
        whole[key] = sum(part[key] for part in parts)
    for key in ("counters", "exits"):
        total: Counter[str] = Counter()
        for part in parts:
            total.update(part[key])
        whole[key] = {name: total[name] for name in sorted(total)}
    for key in ("vcpu", "processes"):
        whole[key] = [{"vm": vm, **row} for vm, part in enumerate(parts) for row in part[key]]
    for key in ("matrix", "marks", "printed"):
        whole[key] = [row for part in parts for row in part[key]]
    return whole


def merge_verdicts(verdicts: Sequence[Verdict], trespasses: Sequence[str]) -> Verdict:
    """Return the verdict over several VMs: coherent if each is and nobody trespassed."""
    sums = {
        name: sum(getattr(verdict, name) for verdict in verdicts)
        for name in Verdict.__struct_fields__
        if name.startswith("n_")
    }
    violations = tuple(one for verdict in verdicts for one in verdict.violations)
    coherent = all(verdict.coherent for verdict in verdicts) and not trespasses
    hazards = tuple(one for verdict in verdicts for one in verdict.hazards)
    return Verdict(coherent=coherent, violations=violations, hazards=hazards, **sums)
