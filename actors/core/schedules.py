"""Schedules of a stepped program: one listed as text, or all of them.

`P` lets process P make one access, `P4` four, `P*` all it has left; `P>bell` all before the first
word whose name begins with "bell", `P>=bell` all before such a word is written. `p`, `p2` and `p*`
drain P's store buffer; `P!`, `P!4`, `P!*`, `P!>bell` are the same as without `!`, but drain it
after every access. Spaces are free, and needed after a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from penumbra.actors.core.stepper import End, Machine, Model, Program, State


@dataclass(frozen=True)
class Verdict:
    """What all schedules of a program come to.

    Schedules that differ only in when a process does what nobody else can see count once.

    Attributes:
        failure: A shortest failing schedule, to be replayed by `run_schedule`; "" when there is
            none.
        reason: What the judge says of it.
    """

    n_states: int
    n_schedules: int
    n_failing: int
    failure: str = ""
    reason: str = ""


class ScheduleError(ValueError):
    """A schedule asks for a step that cannot be taken, or ends too soon."""


_TOKEN: Final = re.compile(r"\s*(?:([A-Z])(!?)(\d+|\*|>\S+)?|([a-z])(\d+|\*)?)")


def run_schedule(program: Program, schedule: str, model: Model = Model.SC) -> End:
    """Run one listed schedule to its end.

    Raises:
        ScheduleError: It asks for an impossible step, or leaves something undone.
    """
    machine = Machine(program, model)
    state = machine.start()
    text = schedule.strip()
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        letter = (token[1] or token[4]).upper() if token else ""
        if token is None or letter not in machine.letters:
            raise ScheduleError(f"no such step: {text[position:]!r}")
        position = token.end()
        p = machine.letters.index(letter)
        if token[4]:
            state = _drain(machine, state, p, token[5] or "1")
        else:
            state = _advance(machine, state, p, token[3] or "1", bool(token[2]))
    if not machine.is_over(state):
        undone = [
            f"{letter}: {machine.label(state, p)}, {len(state[2][p])} stores waiting"
            for p, letter in enumerate(machine.letters)
        ]
        raise ScheduleError("the schedule ends before " + "; ".join(undone))
    return machine.end(state)


def _advance(machine: Machine, state: State, p: int, how: str, drains: bool) -> State:
    left = int(how) if how.isdigit() else -1
    if drains:
        state = _drain(machine, state, p, "*")
    while left and state[1][p].access is not None:
        label = machine.label(state, p)
        if how.startswith(">") and (label.startswith(how[1:]) or label[1:].startswith(how[1:])):
            return state
        if not machine.can_step(state, p):
            raise ScheduleError(f"{machine.letters[p]} is blocked at {label}")
        state = machine.step(state, p)
        if drains:
            state = _drain(machine, state, p, "*")
        left -= 1
    if left > 0 or how.startswith(">"):
        raise ScheduleError(f"{machine.letters[p]} ended before {how}")
    return state


def _drain(machine: Machine, state: State, p: int, how: str) -> State:
    waiting = len(state[2][p])
    n = waiting if how == "*" else int(how)
    if n > waiting:
        raise ScheduleError(f"{machine.letters[p]} has {waiting} stores waiting, not {n}")
    for _ in range(n):
        state = machine.drain(state, p)
    return state


def wander(
    program: Program, choose: Callable[[int], int], model: Model = Model.SC
) -> tuple[End, str]:
    """Run one schedule made of choices; return its end, and the schedule as text.

    Args:
        choose: Given how many moves are possible, at least 2, says which one is made.

    Raises:
        ScheduleError: Nobody can move though somebody has not ended: deadlock.
    """
    machine = Machine(program, model)
    state, text = _settle_locals(machine, machine.start())
    tokens = [text]
    while successors := _successors(machine, state):
        n = len(successors)
        token, state = successors[choose(n) if n > 1 else 0]
        tokens.append(token)
    if not machine.is_over(state):
        raise ScheduleError("deadlock after " + _squeeze(" ".join(tokens)))
    return machine.end(state), _squeeze(" ".join(tokens))


_Count: TypeAlias = tuple[int, int, int, str]
"""Schedules from a state, failing ones, steps to the nearest failure, first token towards it."""


def explore(program: Program, model: Model = Model.SC, limit: int = 1_000_000) -> Verdict:
    """Try every schedule of a program that ends, however its processes interleave.

    A state in which nobody can move, though somebody has not ended, is a failure: deadlock.

    Raises:
        OverflowError: There are more than `limit` states; nothing is known of the rest.
    """
    machine = Machine(program, model)
    known: dict[State, _Count] = {}
    onward: dict[State, list[tuple[str, State]]] = {}
    start, prefix = _settle_locals(machine, machine.start())
    stack = [start]
    while stack:
        state = stack[-1]
        if state in known:
            stack.pop()
            continue
        successors = onward.get(state)
        if successors is None:
            if len(onward) >= limit:
                raise OverflowError(f"more than {limit} states")
            successors = onward[state] = _successors(machine, state)
            stack.extend(after for _, after in successors if after not in known)
            continue
        known[state] = _count(machine, state, successors, known)
        stack.pop()
    return _verdict(machine, known, onward, start, prefix)


def _settle_locals(machine: Machine, state: State, only: int = -1) -> tuple[State, str]:
    """Take every step that nobody else can see, at once."""
    tokens = []
    for p in range(len(machine.letters)) if only < 0 else (only,):
        n = 0
        while machine.is_local(state, p):
            state = machine.step(state, p)
            n += 1
        if n:
            tokens.append(f"{machine.letters[p]}{n}")
    return state, " ".join(tokens)


def _successors(machine: Machine, state: State) -> list[tuple[str, State]]:
    found = []
    for p, drains in machine.moves(state):
        after = machine.drain(state, p) if drains else machine.step(state, p)
        after, local = _settle_locals(machine, after, p)
        letter = machine.letters[p].lower() if drains else machine.letters[p]
        found.append((f"{letter} {local}".strip(), after))
    return found


def _count(
    machine: Machine,
    state: State,
    successors: list[tuple[str, State]],
    known: Mapping[State, _Count],
) -> _Count:
    if not successors:
        fails = not machine.is_over(state) or machine.program.judge(machine.end(state)) is not None
        return 1, int(fails), 0, ""
    n_schedules = n_failing = 0
    nearest, towards = 0, ""
    for token, after in successors:
        n, failing, steps, _ = known[after]
        n_schedules += n
        n_failing += failing
        if failing and (not towards or steps + 1 < nearest):
            nearest, towards = steps + 1, token
    return n_schedules, n_failing, nearest, towards


def _verdict(
    machine: Machine,
    known: Mapping[State, _Count],
    onward: Mapping[State, list[tuple[str, State]]],
    start: State,
    prefix: str,
) -> Verdict:
    n_schedules, n_failing, _, towards = known[start]
    if not n_failing:
        return Verdict(len(known), n_schedules, 0)
    tokens, state = [prefix], start
    while towards:
        tokens.append(towards)
        state = dict(onward[state])[towards]
        towards = known[state][3]
    over = machine.is_over(state)
    reason = (machine.program.judge(machine.end(state)) or "") if over else "deadlock"
    return Verdict(len(known), n_schedules, n_failing, _squeeze(" ".join(tokens)), reason)


def _squeeze(schedule: str) -> str:
    """Write a run of steps of one process as one token: `P P2 P` as `P4`."""
    runs: list[tuple[str, int]] = []
    for letter, n in re.findall(r"([A-Za-z])(\d*)", schedule):
        count = int(n or 1)
        if runs and runs[-1][0] == letter:
            count += runs.pop()[1]
        runs.append((letter, count))
    return " ".join(letter + (str(n) if n > 1 else "") for letter, n in runs)
