"""The world manager: which world each physical CPU runs next. Passive; whoever drives it switches.

A world is one schedulable entity: a VCPU of a VM, the console, an application. Time is guest
progress, so the choice is the same under every scheme. The CPU that is furthest behind goes first;
it keeps its world for a slice, then takes the waiting world that was served least. Within a VM a
world runs at most `skew` ahead of its slowest sibling, and one that sleeps until a time runs when
no sibling is before that time.

Source: A40 ¶51-52 (612); model.md, "two clocks and one conductor".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penumbra.actors.runtime import Conductor

ON_NO_CPU = -1


@dataclass
class World:
    """One schedulable entity.

    Attributes:
        world_id: Dense, from 0.
        vm: Number of its VM; worlds of no VM have negative numbers of their own.
        vcpu: Number of the VCPU within the VM.
        kind: `vm`, `console` or `application`: which descriptor table is loaded while it runs.
        served: Progress it has made on any CPU.
        cpu: The physical CPU it is seated on, or `ON_NO_CPU`.
    """

    world_id: int
    vm: int
    vcpu: int
    kind: str = "vm"
    served: int = 0
    cpu: int = ON_NO_CPU


@dataclass(frozen=True)
class Ready:
    """A world that can go on: at which progress of its own, and whether it sleeps until then."""

    world_id: int
    key: int
    asleep: bool = False


@dataclass(frozen=True)
class Turn:
    """The next grant: this world on this CPU; `switched` if another one sat there before."""

    cpu: int
    world: World
    left: World | None
    switched: bool


class WorldManager:
    """Worlds on physical CPUs.

    Invariant: a world is seated on at most one CPU, and a CPU seats at most one world.
    """

    def __init__(self, n_cpus: int, slice_progress: int, skew: int, conductor: Conductor) -> None:
        self.worlds: list[World] = []
        self._seated: list[World | None] = [None] * n_cpus
        self._clocks = [0] * n_cpus
        self._used = [0] * n_cpus
        self._slice = slice_progress
        self._skew = skew
        self._conductor = conductor

    def add(self, vm: int, vcpu: int, kind: str = "vm") -> World:
        """Register a world; it is on no CPU yet."""
        world = World(len(self.worlds), vm, vcpu, kind)
        self.worlds.append(world)
        return world

    def next(self, ready: Sequence[Ready]) -> Turn | None:
        """Choose a CPU and its world and seat it; None if no world may run.

        Args:
            ready: Every world that can go on.
        """
        may = self._eligible(ready)
        waiting = [w for w in may if self.worlds[w].cpu == ON_NO_CPU]
        cpus = [
            (cpu, self._clocks[cpu])
            for cpu, world in enumerate(self._seated)
            if waiting or (world is not None and world.world_id in may)
        ]
        if not cpus:
            return None
        cpu = self._conductor.next(cpus)
        now = self._clocks[cpu]
        # Who had nothing to do does not get the time back.
        self._clocks = [max(clock, now) for clock in self._clocks]
        before = self._seated[cpu]
        stays = before is not None and before.world_id in may
        if stays and (not waiting or self._used[cpu] < self._slice):
            assert before is not None
            return Turn(cpu, before, None, switched=False)
        world = self.worlds[self._conductor.next([(w, self.worlds[w].served) for w in waiting])]
        self._seat(cpu, world)
        return Turn(cpu, world, before, switched=True)

    def served(self, turn: Turn, progress: int) -> None:
        """Account for the progress a turn has made."""
        turn.world.served += progress
        self._used[turn.cpu] += progress
        # A turn without progress costs one, or an idle world would hold its CPU's time still.
        self._clocks[turn.cpu] += max(progress, 1)

    def on(self, cpu: int) -> World | None:
        """Return the world seated on a CPU."""
        return self._seated[cpu]

    def leave(self, world: World) -> None:
        """Take a world off its CPU, for good or until it is chosen again."""
        if world.cpu != ON_NO_CPU:
            self._seated[world.cpu] = None
            world.cpu = ON_NO_CPU

    def _seat(self, cpu: int, world: World) -> None:
        before = self._seated[cpu]
        if before is not None:
            before.cpu = ON_NO_CPU
        self._seated[cpu] = world
        self._used[cpu] = 0
        world.cpu = cpu

    def _eligible(self, ready: Sequence[Ready]) -> set[int]:
        slowest: dict[int, int] = {}
        for one in ready:
            vm = self.worlds[one.world_id].vm
            slowest[vm] = min(slowest.get(vm, one.key), one.key)
        return {
            one.world_id
            for one in ready
            if one.key <= slowest[self.worlds[one.world_id].vm] + (0 if one.asleep else self._skew)
        }

    def check(self) -> None:
        """Assert the class invariant."""
        for cpu, world in enumerate(self._seated):
            assert world is None or world.cpu == cpu
        for world in self.worlds:
            assert world.cpu == ON_NO_CPU or self._seated[world.cpu] is world
