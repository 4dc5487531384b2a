"""A memory whose every access is a step: schedules are listed, or all of them are tried.

A *process* is a plain function of what it reads: it is given the memory, makes whatever private
state it needs (a `Producer`, a `Consumer`), and returns a value. To let it take one more step it is
run again from its beginning with the values it has read so far, up to the first access it has not
made yet. Nothing in it is suspended, so the code under test is the code in use.

On SC a store is visible at once. On TSO it waits in its process's buffer, first in first out; its
own loads see it there; draining one store is a step of its own. A fence, an exchange or a lock
waits until the buffer is empty, as x86 has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TypeAlias

from penumbra.actors.core.words import Words


class Model(Enum):
    """What other processes see of a store."""

    SC = "sc"
    TSO = "tso"


class _Do(IntEnum):
    LOAD = 0
    STORE = 1
    FENCE = 2
    EXCHANGE = 3
    ADD = 4
    AND = 5
    LOCK = 6
    UNTIL = 7
    UNTIL_ANY = 8


@dataclass(frozen=True, slots=True)
class _Access:
    do: _Do
    at: int = 0
    value: int = 0
    others: tuple[tuple[int, int], ...] = ()

    @property
    def alternatives(self) -> tuple[tuple[int, int], ...]:
        return ((self.at, self.value), *self.others)


class _NextStep(BaseException):
    """Unwinds a process at the first access it has not made yet."""

    def __init__(self, access: _Access) -> None:
        self.access = access


class StepMemory:
    """What a process sees: the words, and the ports to them."""

    __slots__ = ("_log", "_position")

    def __init__(self, log: tuple[int, ...]) -> None:
        self._log = log
        self._position = 0

    def __getitem__(self, at: int, /) -> int:
        return self._step(_Do.LOAD, at, 0)

    def __setitem__(self, at: int, value: int, /) -> None:
        self._step(_Do.STORE, at, value)

    def fence(self) -> None:
        self._step(_Do.FENCE, 0, 0)

    def exchange(self, words: Words, at: int, value: int) -> int:
        return self._step(_Do.EXCHANGE, at, value)

    def add(self, words: Words, at: int, n: int) -> int:
        return self._step(_Do.ADD, at, n) + n

    def and_(self, at: int, mask: int) -> int:
        """Clear bits as one step; return what was there."""
        return self._step(_Do.AND, at, mask)

    def lock(self, words: Words, at: int) -> None:
        self._step(_Do.LOCK, at, 0)

    def unlock(self, words: Words, at: int) -> None:
        self._step(_Do.STORE, at, 0)

    def until(self, at: int, value: int) -> None:
        """Wait until a word holds a value."""
        self._step(_Do.UNTIL, at, value)

    def until_any(self, *words: tuple[int, int]) -> int:
        """Wait until one of several words holds its value; return the first that does."""
        (at, value), *others = words
        return self._step(_Do.UNTIL_ANY, at, value, tuple(others))

    def _step(self, do: _Do, at: int, value: int, others: tuple[tuple[int, int], ...] = ()) -> int:
        position = self._position
        if position == len(self._log):
            raise _NextStep(_Access(do, at, value, others))
        self._position = position + 1
        return self._log[position]


def _nobody(_at: int) -> str:
    return ""


Process: TypeAlias = Callable[[StepMemory], object]


@dataclass(frozen=True)
class End:
    """How a run ended: what each process returned, and the memory, buffers drained."""

    results: Mapping[str, object]
    memory: Mapping[int, int]


@dataclass(frozen=True)
class Program:
    """A few processes over one memory, and the judge of how they may end.

    Attributes:
        processes: Each under one capital letter.
        judge: What is wrong with an end, or None.
        initial: Words that do not start at zero.
        name: Names a word for schedules and reports.
        owner: The one process that writes a word, or "": its own loads of it need no schedule.
    """

    processes: Mapping[str, Process]
    judge: Callable[[End], str | None]
    initial: Mapping[int, int] = field(default_factory=dict[int, int])
    name: Callable[[int], str] = str
    owner: Callable[[int], str] = _nobody


class _Node:
    """A process after a given history: its next access, or its result."""

    __slots__ = ("access", "after", "log", "owned", "result")

    def __init__(self, role: _Role, log: tuple[int, ...]) -> None:
        self.log = log
        self.after: dict[int, _Node] = {}
        self.access: _Access | None = None
        self.owned = False
        self.result: object = None
        try:
            self.result = role.process(StepMemory(log))
        except _NextStep as step:
            self.access = step.access
            self.owned = role.owner(step.access.at) == role.letter

    def next(self, role: _Role, value: int) -> _Node:
        node = self.after.get(value)
        if node is None:
            node = self.after[value] = _Node(role, (*self.log, value))
        return node


@dataclass(frozen=True, slots=True)
class _Role:
    letter: str
    process: Process
    owner: Callable[[int], str]


_Buffer: TypeAlias = tuple[tuple[int, int], ...]
State: TypeAlias = tuple[tuple[int, ...], tuple[_Node, ...], tuple[_Buffer, ...]]
_Move: TypeAlias = tuple[int, bool]
"""Which process, and whether it drains."""


class Machine:
    """The transitions: state in, state out. Words are numbered densely as they are first met."""

    def __init__(self, program: Program, model: Model) -> None:
        self._tso = model is Model.TSO
        self.letters = tuple(program.processes)
        for letter in self.letters:
            if not re.fullmatch("[A-Z]", letter):
                raise ValueError(f"a process is named by one capital letter, not {letter!r}")
        self.program = program
        self._roles = tuple(
            _Role(letter, process, program.owner) for letter, process in program.processes.items()
        )
        self._index: dict[int, int] = {}
        self._initial = program.initial

    def start(self) -> State:
        memory = tuple(self._initial.values())
        self._index = {at: i for i, at in enumerate(self._initial)}
        nodes = tuple(_Node(role, ()) for role in self._roles)
        return memory, nodes, tuple(() for _ in nodes)

    def load(self, memory: tuple[int, ...], at: int) -> int:
        i = self._index.get(at, -1)
        return memory[i] if 0 <= i < len(memory) else 0

    def _store(self, memory: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
        i = self._index.setdefault(at, len(self._index))
        if i >= len(memory):
            memory += (0,) * (i + 1 - len(memory))
        return (*memory[:i], value, *memory[i + 1 :])

    def can_step(self, state: State, p: int) -> bool:
        memory, nodes, buffers = state
        access = nodes[p].access
        if access is None:
            return False
        match access.do:
            case _Do.LOAD | _Do.STORE:
                return True
            case _Do.UNTIL:
                return not buffers[p] and self.load(memory, access.at) == access.value
            case _Do.UNTIL_ANY:
                return not buffers[p] and any(
                    self.load(memory, at) == value for at, value in access.alternatives
                )
            case _Do.LOCK:
                return not buffers[p] and self.load(memory, access.at) == 0
            case _:
                return not buffers[p]

    def is_local(self, state: State, p: int) -> bool:
        """True when nobody else can see the next step, nor change what it sees."""
        _, nodes, buffers = state
        access = nodes[p].access
        if access is None:
            return False
        if access.do is _Do.LOAD:
            return nodes[p].owned or any(at == access.at for at, _ in buffers[p])
        if access.do is _Do.STORE:
            return self._tso
        return access.do is _Do.FENCE and not buffers[p]

    def step(self, state: State, p: int) -> State:
        """Let a process make its next access; `can_step` must hold."""
        memory, nodes, buffers = state
        access = nodes[p].access
        assert access is not None
        at, value, seen = access.at, access.value, 0
        match access.do:
            case _Do.LOAD:
                waiting = [stored for address, stored in buffers[p] if address == at]
                seen = waiting[-1] if waiting else self.load(memory, at)
            case _Do.STORE if self._tso:
                buffers = _put(buffers, p, (*buffers[p], (at, value)))
            case _Do.STORE:
                memory = self._store(memory, at, value)
            case _Do.EXCHANGE | _Do.ADD | _Do.AND:
                seen = self.load(memory, at)
                new = {_Do.EXCHANGE: value, _Do.ADD: seen + value, _Do.AND: seen & value}[access.do]
                memory = self._store(memory, at, new)
            case _Do.UNTIL_ANY:
                held = [self.load(memory, at) == value for at, value in access.alternatives]
                seen = held.index(True)
            case _Do.LOCK:
                memory = self._store(memory, at, 1)
            case _Do.FENCE | _Do.UNTIL:
                pass
        node = nodes[p].next(self._roles[p], seen)
        return memory, (*nodes[:p], node, *nodes[p + 1 :]), buffers

    def drain(self, state: State, p: int) -> State:
        memory, nodes, buffers = state
        (at, value), *rest = buffers[p]
        return self._store(memory, at, value), nodes, _put(buffers, p, tuple(rest))

    def moves(self, state: State) -> Iterator[_Move]:
        for p, buffer in enumerate(state[2]):
            if buffer:
                yield p, True
            if self.can_step(state, p):
                yield p, False

    def is_over(self, state: State) -> bool:
        return all(node.access is None for node in state[1]) and not any(state[2])

    def end(self, state: State) -> End:
        memory, nodes, _ = state
        results = {letter: node.result for letter, node in zip(self.letters, nodes, strict=True)}
        return End(results, {at: self.load(memory, at) for at in self._index})

    def label(self, state: State, p: int) -> str:
        """Name a process's next access: the word's name, with = before it when it is written."""
        access = state[1][p].access
        if access is None:
            return "its end"
        if access.do is _Do.FENCE:
            return "fence"
        writes = access.do not in (_Do.LOAD, _Do.UNTIL, _Do.UNTIL_ANY)
        return ("=" if writes else "") + self.program.name(access.at)


def _put(buffers: tuple[_Buffer, ...], p: int, buffer: _Buffer) -> tuple[_Buffer, ...]:
    return (*buffers[:p], buffer, *buffers[p + 1 :])
