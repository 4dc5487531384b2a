"""How a change of a guest entry reaches the other sub-VMMs: the propagation policies.

Each policy answers the same calls. `tell` returns the consumers that are owed a shootdown now:
all of them under the immediate policy (A40 ¶91), those whose channel is full under the patch
matrix (Fig. 11, 844), nobody where a full channel is met otherwise (¶128).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

from penumbra.actors.core import Covers, Drained, Matrix, Patch
from penumbra.actors.vmm.schemes import SchemeOptions

Key = tuple[int, int]
_NOTHING = Drained([])
_DEFAULTS = SchemeOptions()


class Propagation(Protocol):
    """What a sub-VMM asks of its policy."""

    def begin(self, producer: int, keys: Sequence[Key]) -> None:
        """Announce the entries a store is about to touch (P1)."""

    def tell(
        self, producer: int, key: Key, consumers: int, derived: int | None, source: int
    ) -> int:
        """Tell each consumer of the bit set; return the bit set of those owed a shootdown."""
        ...

    def stored(self, producer: int) -> None:
        """The store is visible (831); what is derived from now on is derived from it."""

    def end(self, producer: int) -> None:
        """Every consumer is told and has acknowledged what it had to (P9)."""

    def lose(self, producer: int, consumers: int) -> int:
        """Tell each consumer to drop everything at its next event; return who is owed it now."""
        ...

    def drain(self, consumer: int, covers: Covers | None) -> Drained:
        """Take the patches a coherency event makes relevant; None covers everything."""
        ...

    def blockers(self, producer: int, consumers: int) -> int:
        """Return who must drain before `tell` has room for these again; 0 = do not wait."""
        ...

    def drain_base(self, consumer: int, base: int) -> Drained:
        """Take the patches for one guest table, because its shadows are to go."""
        ...

    def drain_bases(self, consumer: int, bases: Container[int]) -> Drained:
        """Take the patches for guest tables whose shadows are to be linked again (EP7)."""
        ...

    def usable(self, consumer: int, patch: Patch, current: int, mask: int) -> bool:
        """Say whether the derived value of a patch just drained may be installed (C8)."""
        ...

    def settle(self, consumer: int) -> None:
        """What the last `drain` obliged to is done (C9)."""


class ImmediateShootdown:
    """Nothing is posted: every consumer is shot down at the store."""

    def begin(self, producer: int, keys: Sequence[Key]) -> None:
        pass

    def tell(
        self, producer: int, key: Key, consumers: int, derived: int | None, source: int
    ) -> int:
        return consumers

    def stored(self, producer: int) -> None:
        pass

    def end(self, producer: int) -> None:
        pass

    def lose(self, producer: int, consumers: int) -> int:
        return consumers

    def drain(self, consumer: int, covers: Covers | None) -> Drained:
        return _NOTHING

    def blockers(self, producer: int, consumers: int) -> int:
        return 0

    def drain_base(self, consumer: int, base: int) -> Drained:
        return _NOTHING

    def drain_bases(self, consumer: int, bases: Container[int]) -> Drained:
        return _NOTHING

    def usable(self, consumer: int, patch: Patch, current: int, mask: int) -> bool:
        return False

    def settle(self, consumer: int) -> None:
        pass


class PatchChannels:
    """The patch channels: bounded, filled at each traced store and read at coherency events."""

    def __init__(self, matrix: Matrix, options: SchemeOptions = _DEFAULTS) -> None:
        self._derived = options.derived
        self._overflow = options.overflow
        self._postpones = options.postpone != "never"
        self._producers = [matrix.producer(i) for i in range(matrix.n)]
        self._consumers = [matrix.consumer(i) for i in range(matrix.n)]

    def begin(self, producer: int, keys: Sequence[Key]) -> None:
        self._producers[producer].begin(keys)

    def tell(
        self, producer: int, key: Key, consumers: int, derived: int | None, source: int
    ) -> int:
        unit = self._producers[producer]
        value = derived if self._derived else None
        full = unit.post_all(consumers, key[0], key[1], value, source)
        if full and self._overflow == "lost":
            for consumer in range(len(self._consumers)):
                if full >> consumer & 1:
                    unit.lose(consumer)
            return 0
        return full

    def blockers(self, producer: int, consumers: int) -> int:
        return self._producers[producer].blockers(consumers) if self._overflow == "wait" else 0

    def stored(self, producer: int) -> None:
        self._producers[producer].stored()

    def end(self, producer: int) -> None:
        self._producers[producer].end()

    def lose(self, producer: int, consumers: int) -> int:
        for consumer in range(len(self._consumers)):
            if consumers >> consumer & 1:
                self._producers[producer].lose(consumer)
        return 0

    def drain(self, consumer: int, covers: Covers | None) -> Drained:
        return self._consumers[consumer].event(covers if self._postpones else None)  # 868

    def drain_base(self, consumer: int, base: int) -> Drained:
        return self._consumers[consumer].drain_base(base)

    def drain_bases(self, consumer: int, bases: Container[int]) -> Drained:
        return self._consumers[consumer].drain_bases(bases)

    def usable(self, consumer: int, patch: Patch, current: int, mask: int) -> bool:
        return self._consumers[consumer].usable(patch, current, mask)

    def settle(self, consumer: int) -> None:
        # Trace placers ask (T3a) and are served between exits, so what C9 finds needs no repair.
        self._consumers[consumer].settle()
