"""The kernel: several VMs, or more VCPUs than CPUs, on one set of physical CPUs.

Each VCPU is a world. The conductor picks the physical CPU, the world manager its world; a world
switch loads the world's modes and root and drops what was cached, so no translation of one VM
outlives its turn. Every frame an access uses is held against who owns it.

Source: A40 ¶45-52 (600, 612), Fig. 5; model.md, "isolation".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import anyio.lowlevel
import numpy as np
import numpy.typing as npt

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.hardware import Hardware
from penumbra.actors.machine.kernel import KernelServices
from penumbra.actors.machine.machine import Machine, settled_tree
from penumbra.actors.machine.routes import Vector
from penumbra.actors.machine.seat import CpuRef, WorldSeat
from penumbra.actors.machine.worlds import Ready, Turn, World, WorldManager
from penumbra.actors.observe.events import EventKind
from penumbra.actors.runtime import ActorSystem, Conductor, LowestKey, SystemTree
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.streams import AccessStream

_TURN_SECONDS = 0.05


class Host:
    """VMs under one kernel.

    Invariant: between two turns every exit is complete, and each world sits on at most one CPU.

    Attributes:
        trespasses: What VMs have used that was not theirs; empty, or the monitor is broken.

    Args:
        hardware: What they share; None: each machine has hardware of its own, and the kernel only
            says who runs.
        machines: VM i with `Place.vm_id` i.
        config: Of each VM, and of the kernel: `cpus`, `slice`, `skew`, `form`, `applications`.
    """

    def __init__(
        self,
        hardware: Hardware | None,
        machines: Sequence[Machine],
        config: MachineConfig,
        seed: int,
    ) -> None:
        self.hardware = hardware
        self.machines = machines
        self.tree = SystemTree("host", ())
        n_cpus = config.cpus or config.vcpus
        self.manager = WorldManager(n_cpus, config.slice, config.skew, Conductor(LowestKey(seed)))
        self._quantum = config.quantum
        self._worlds = {
            (vm, vcpu): self.manager.add(vm, vcpu)
            for vm, machine in enumerate(machines)
            for vcpu in range(machine.config.vcpus)
        }
        self.kernel = KernelServices(
            self.manager, config.form, config.applications, config.application_work,
            bare=hardware is None,
        )  # fmt: skip
        self._seats: list[list[WorldSeat]] = []
        self._refs: list[CpuRef] = []
        self.trespasses: list[str] = []

    async def run(self, on_turn: Callable[[], None] | None = None) -> None:
        """Run until every VM has ended; each one's `ended` says why.

        Args:
            on_turn: Called once per turn of the event loop, some twenty times a second.
        """
        try:
            async with ActorSystem("host") as system:
                self._build(system)
                await self._conduct(on_turn)
                self.tree = await settled_tree(system)
        finally:
            for machine in self.machines:
                machine.close()

    def _build(self, system: ActorSystem) -> None:
        hardware = self.hardware
        self.kernel.build(system)
        for machine in self.machines:
            machine.kernel_calls = self.kernel
        if hardware is None:
            for vm, machine in enumerate(self.machines):
                machine.build_alone(system, f"vm-{vm}.")
            return
        self._refs = hardware.spawn(system)
        for vm, machine in enumerate(self.machines):
            seats = [WorldSeat(hardware.cpus[0]) for _ in range(machine.config.vcpus)]
            self._seats.append(seats)
            machine.build(system, seats, f"vm-{vm}.")

    async def _conduct(self, on_turn: Callable[[], None] | None) -> None:
        since = time.monotonic()
        while (turn := self.manager.next(self._ready())) is not None:
            self._take_turn(turn)
            now = time.monotonic()
            if now - since > _TURN_SECONDS:
                since = now
                if on_turn:
                    on_turn()
                await anyio.lowlevel.checkpoint()
        self.kernel.finish()

    def _ready(self) -> list[Ready]:
        """Return every world that can go on; VMs where none can have ended."""
        found = []
        for vm, machine in enumerate(self.machines):
            ran = not machine.ended
            ready = [] if machine.ended else machine.ready()
            if ran and machine.ended:
                self._end(vm)
            found += [
                Ready(self._worlds[vm, vcpu].world_id, key, asleep) for vcpu, key, asleep in ready
            ]
        return found + self.kernel.ready() if found else []

    def _take_turn(self, turn: Turn) -> None:
        world = turn.world
        if turn.switched:
            if turn.left is not None:
                self.kernel.routed(turn.left, Vector.TIMER)
            self._switch(turn)
        if world.kind != "vm":
            self.manager.served(turn, self.kernel.run(world, self._quantum))
            return
        machine = self.machines[world.vm]
        before = machine.observer.progress[world.vcpu]
        machine.grant(world.vcpu)
        self.manager.served(turn, machine.observer.progress[world.vcpu] - before)
        if machine.ended:
            self._end(world.vm)

    def _end(self, vm: int) -> None:
        """A VM has ended: its worlds leave their CPUs, the others run on."""
        machine = self.machines[vm]
        machine.devices.window.flush()
        machine.observer.note(machine.running, EventKind.VM_END)
        for vcpu in range(machine.config.vcpus):
            world = self._worlds[vm, vcpu]
            self._get_up(world)
            self.manager.leave(world)

    # ---- world switches --------------------------------------------------------------------------

    def _switch(self, turn: Turn) -> None:
        if turn.left is not None:
            self._get_up(turn.left)
        world, hardware = turn.world, self.hardware
        if hardware is None or world.kind != "vm":
            return
        cpu = hardware.cpus[turn.cpu]
        machine = self.machines[world.vm]
        machine.sits_down(world.vcpu, cpu)
        self._guard(world.vm, cpu, hardware.owner)
        self._seats[world.vm][world.vcpu].take(self._refs[turn.cpu], cpu)
        machine.observer.count(world.vcpu, "world_switch")
        left = turn.left.world_id + 1 if turn.left else 0
        machine.observer.note(world.vcpu, EventKind.WORLD_SWITCH, 0, world.world_id, left)

    def _get_up(self, world: World) -> None:
        if not self._seats or world.kind != "vm":
            return
        seat = self._seats[world.vm][world.vcpu]
        if seat.seated:
            self.machines[world.vm].tell_logged(world.vcpu)
            seat.leave()
            self.machines[world.vm].observer.gets_up(world.vcpu)

    def _guard(self, vm: int, cpu: PhysicalCpu, owner: npt.NDArray[np.int16]) -> None:
        """Hold every frame this VM's accesses use on this CPU against who owns it."""
        used, block = cpu.on_used, cpu.on_block

        def on_used(gva: int, kind: int, user: bool, pfn: int) -> None:
            if pfn < len(owner) and owner[pfn] != vm:
                self._trespass(vm, pfn, owner[pfn])
            if used is not None:
                used(gva, kind, user, pfn)

        def on_block(
            sid: int, stream: AccessStream, start: int, frames: npt.NDArray[np.int64]
        ) -> None:
            inside = frames[frames < len(owner)]
            foreign = inside[owner[inside] != vm]
            if len(foreign):
                self._trespass(vm, int(foreign[0]), int(owner[foreign[0]]))
            if block is not None:
                block(sid, stream, start, frames)

        cpu.on_used, cpu.on_block = on_used, on_block

    def _trespass(self, vm: int, pfn: int, owner: int) -> None:
        """End a VM that has used a frame the kernel never gave it."""
        machine = self.machines[vm]
        machine.ended = f"isolation: frame {pfn:#x} belongs to VM {owner}"
        self.trespasses.append(machine.ended)
