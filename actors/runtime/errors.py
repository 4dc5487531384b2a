"""What goes wrong between actors, as types a caller can tell apart.

Each error carries plain values only, never an object of the actor it speaks of: an exception
crosses the same boundary as a message.
"""

from __future__ import annotations


class ActorError(Exception):
    """Base of all that this package raises."""


class NotAccepted(ActorError, TypeError):
    """A value is not of the type its receiver declares, or its fields are not.

    The caller's mistake: raised at the door, so the receiver never meets the value.
    """

    def __init__(self, value: object, reason: str) -> None:
        self.kind = type(value).__qualname__
        self.reason = reason
        super().__init__(f"{self.kind} is not accepted here: {reason}")


class Closed(ActorError):
    """`name` takes no more messages; what was asked and not yet answered stays unanswered."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{name!r} is closed")


class Reentered(ActorError):
    """`actor` was asked while one of its own handlers is on the stack below the caller."""

    def __init__(self, actor: str) -> None:
        self.actor = actor
        super().__init__(f"{actor!r} is already on the stack: ask it later, or offer instead")


class HandlerFailed(ActorError):
    """A handler of `actor` raised; `cause` is the text of what it raised.

    The exception itself goes to the actor's own task.
    """

    def __init__(self, actor: str, cause: str) -> None:
        self.actor = actor
        self.cause = cause
        super().__init__(f"a handler of {actor!r} failed: {cause}")


class Restarting(ActorError):
    """`actor` is between a failure and its restart; this question was not served. Ask it again."""

    def __init__(self, actor: str) -> None:
        self.actor = actor
        super().__init__(f"{actor!r} is restarting: the question was not served")


class MustQueue(ActorError):
    """`actor` has async handlers: it is asked by `await ask()`, never on the caller's stack."""

    def __init__(self, actor: str) -> None:
        self.actor = actor
        super().__init__(f"{actor!r} has async handlers: await ask() instead of ask_nowait()")


class Deadlock(ActorError):
    """A wait was refused, as it would have closed a cycle of waits that never ends.

    `cycle` names the waits, from the refused one on: who, "room at" or "a reply of", and where.
    """

    def __init__(self, cycle: tuple[tuple[str, str, str], ...]) -> None:
        self.cycle = cycle
        waits = ", ".join(f"{who} waits for {what} {where!r}" for who, what, where in cycle)
        super().__init__(f"deadlock: {waits}")


class AskTimeout(ActorError, TimeoutError):
    """`actor` did not answer in time. It is not interrupted: it may still serve the question."""

    def __init__(self, actor: str, seconds: float) -> None:
        self.actor = actor
        self.seconds = seconds
        super().__init__(f"{actor!r} did not answer within {seconds} s")


class ScheduleMismatch(ActorError):
    """A schedule names `wanted`, which is not among `candidates`; None: the schedule has ended."""

    def __init__(self, step: int, wanted: int | None, candidates: tuple[int, ...]) -> None:
        self.step = step
        self.wanted = wanted
        self.candidates = candidates
        what = "nobody: the schedule has ended" if wanted is None else str(wanted)
        super().__init__(f"step {step} names {what}; candidates are {list(candidates)}")
