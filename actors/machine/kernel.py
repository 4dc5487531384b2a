"""What the kernel does besides scheduling: calls from monitors, physical interrupts, other worlds.

Each physical interrupt goes the way of the world it interrupts (`routes`). In the hosted form the
kernel is a host OS with a world of its own, so every device call of a monitor costs a switch there
and back; a dedicated kernel is called.

Source: A40 ¶44-56 (600, 655, 420).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from penumbra.actors.machine.console import (
    ApplicationActor,
    ConsoleActor,
    Keys,
    Left,
    Rpc,
    Work,
    WorldOrder,
)
from penumbra.actors.machine.machine import Machine
from penumbra.actors.machine.routes import Route, Vector, route
from penumbra.actors.machine.worlds import ON_NO_CPU, Ready, World, WorldManager
from penumbra.actors.runtime import ActorRef, ActorSystem
from penumbra.hw.disk import DISK_VECTOR

Form = Literal["kernel", "hosted"]
_CONSOLE = -1


class KernelServices:
    """Calls, interrupts and the worlds that are no VCPU.

    Args:
        bare: There is no monitor to call anybody: the same choices, nothing counted.

    Attributes:
        routes: How often each interrupt went each way: (kind of world, vector, route).
        said: What the console has printed.
    """

    def __init__(
        self, manager: WorldManager, form: Form, n_applications: int, work: int, *, bare: bool
    ) -> None:
        self._bare = bare
        self.routes: Counter[tuple[str, Vector, Route]] = Counter()
        self.said: list[str] = []
        self._manager = manager
        self._form = form
        self._console_world = manager.add(_CONSOLE, 0, "console")
        self._applications = [
            (manager.add(_CONSOLE - 1 - i, 0, "application"), work) for i in range(n_applications)
        ]
        self._console: ActorRef[WorldOrder, Left] | None = None
        self._asks: dict[int, Callable[[Work], Left]] = {}
        self._left: dict[int, int] = {}

    def build(self, system: ActorSystem) -> None:
        """Spawn the console's task and the applications'."""
        self._console = system.spawn(ConsoleActor(), "console")
        self._asks[self._console_world.world_id] = self._console.ask_nowait
        for i, (world, work) in enumerate(self._applications):
            application = system.spawn(ApplicationActor(work), f"application-{i}")
            self._asks[world.world_id] = application.ask_nowait
            self._left[world.world_id] = work

    # ---- scheduling ------------------------------------------------------------------------------

    def ready(self) -> list[Ready]:
        """Return the worlds besides the VCPUs that have something to do."""
        worlds = self._manager.worlds
        return [Ready(i, worlds[i].served) for i, left in self._left.items() if left]

    def run(self, world: World, limit: int) -> int:
        """Run one of them; return the progress it made."""
        done = self._asks[world.world_id](Work(limit))
        self._left[world.world_id] = done.n_left
        self.said += done.said
        return done.spent

    def finish(self) -> None:
        """The last VM has ended: let the console say what is left."""
        while self._left.get(self._console_world.world_id):
            self.run(self._console_world, 1 << 20)

    # ---- calls of monitors (`KernelCalls`) -------------------------------------------------------

    def posted(self, machine: Machine, vcpu_id: int, vector: int) -> None:
        """An action was posted: if its VCPU runs, a check-action IPI makes the monitor look."""
        if vector == DISK_VECTOR:
            self.interrupt(0, Vector.DISK)
        world = self._world_of(machine, vcpu_id)
        if world.cpu != ON_NO_CPU and not self._bare:
            machine.observer.count(vcpu_id, "check_action_ipi")
            self.interrupt(world.cpu, Vector.CHECK_ACTION)

    def device_called(self, machine: Machine, vcpu_id: int) -> None:
        """A monitor has the kernel, or the host OS, drive a device."""
        if self._bare:
            return
        machine.observer.count(vcpu_id, "kernel_call")
        if self._form == "hosted":
            machine.observer.count(vcpu_id, "world_switch", 2)

    def reported(self, machine: Machine, text: str) -> None:
        """A monitor calls an application of the console."""
        self._tell_console(Rpc(machine.observer.vm, text))

    def typed(self, text: str, cpu: int = 0) -> None:
        """Somebody types at the console: an interrupt of a physical CPU."""
        if self.interrupt(cpu, Vector.KEYBOARD) is Route.CONSOLE:
            self._tell_console(Keys(text))

    def _tell_console(self, message: Rpc | Keys) -> None:
        assert self._console is not None, "the console runs only while the machine does"
        self._left[self._console_world.world_id] = self._console.ask_nowait(message).n_left

    def _world_of(self, machine: Machine, vcpu_id: int) -> World:
        vm = machine.observer.vm
        return next(w for w in self._manager.worlds if (w.vm, w.vcpu) == (vm, vcpu_id))

    # ---- physical interrupts ---------------------------------------------------------------------

    def interrupt(self, cpu: int, vector: Vector) -> Route:
        """Route one physical interrupt by the table loaded on its CPU."""
        return self.routed(self._manager.on(cpu), vector)

    def routed(self, world: World | None, vector: Vector) -> Route:
        """Route one physical interrupt by the table of the world it interrupts."""
        kind = world.kind if world else None
        way = route(kind, vector)
        self.routes[kind or "none", vector, way] += 1
        return way
