"""Worlds that are no VCPU: the console OS with its RPC, and applications beside the VMs.

They take physical CPUs from the VMs as any world does. What the console is told waits until its
world runs: a monitor that calls it goes on at once.

Source: A40 ¶47-51 (420, 430).
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

import msgspec

from penumbra.actors.runtime import Actor

_PROGRESS_PER_CALL = 200


class Rpc(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """A monitor calls an application of the console: VM `vm` has something to say."""

    vm: int
    text: str


class Keys(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """The kernel forwards what was typed at the console's keyboard."""

    text: str


class Work(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """The world runs for at most `limit` progress."""

    limit: int


class Left(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """So much progress was made; so many pieces of work are left; what the console said."""

    spent: int
    n_left: int
    said: tuple[str, ...] = ()


WorldOrder: TypeAlias = Rpc | Keys | Work


class ConsoleActor(Actor[WorldOrder, Left]):
    """The console OS: serves calls and key strokes in order, when its world runs."""

    def __init__(self) -> None:
        self._waiting: deque[str] = deque()

    def receive(self, message: WorldOrder) -> Left:
        if isinstance(message, Rpc):
            self._waiting.append(f"VM {message.vm}: {message.text}")
        elif isinstance(message, Keys):
            self._waiting.append(f"> {message.text}")
        else:
            return self._work(message.limit)
        return Left(0, len(self._waiting))

    def _work(self, limit: int) -> Left:
        n = min(len(self._waiting), max(1, limit // _PROGRESS_PER_CALL))
        said = tuple(self._waiting.popleft() for _ in range(n))
        return Left(n * _PROGRESS_PER_CALL, len(self._waiting), said)


class ApplicationActor(Actor[Work, Left]):
    """An application that computes for `work` progress in all."""

    def __init__(self, work: int) -> None:
        self._left = work

    def receive(self, message: Work) -> Left:
        spent = min(message.limit, self._left)
        self._left -= spent
        return Left(spent, self._left)
