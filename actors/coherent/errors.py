"""What can go wrong for an application, as types it can tell apart."""

from __future__ import annotations


class CoherentError(Exception):
    """Base of all that this package raises."""


class NotRunning(CoherentError):
    """`name` belongs to no running fabric: not entered yet, or left meanwhile."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{name!r} belongs to no running fabric")


class NotSettled(CoherentError, TimeoutError):
    """A version was not reached in time; the data is as coherent as before.

    Attributes:
        behind: Numbers of the workers that had not applied it; none if nobody made it yet.
    """

    def __init__(self, source: str, version: int, seconds: float, behind: tuple[int, ...]) -> None:
        self.version = version
        self.behind = behind
        who = f"workers {list(behind)} are behind" if behind else "there is no such version yet"
        super().__init__(f"version {version} of {source!r} not settled in {seconds} s: {who}")


class Overtaken(CoherentError):
    """What a value is derived from changed during each of `attempts` derivations of it."""

    def __init__(self, view: str, key: object, attempts: int) -> None:
        self.attempts = attempts
        super().__init__(f"{view}({key!r}) was overtaken by changes {attempts} times in a row")


class Circular(CoherentError):
    """A derivation needs, directly or through others, its own result."""

    def __init__(self, view: str, key: object) -> None:
        super().__init__(f"{view}({key!r}) is derived from itself")


class StaleRead(CoherentError, AssertionError):
    """A read under `checked` gave another value than its primary data gives."""

    def __init__(self, view: str, key: object, found: object, expected: object) -> None:
        self.found = found
        self.expected = expected
        super().__init__(f"{view}({key!r}) gave {found!r}, its primary data gives {expected!r}")
