"""How a monitor gets control of privileged instructions: what each of them costs the guest.

All three ways do the same; they differ in what is counted. *Assisted*: the hardware intercepts what
the monitor asked for and nothing else. *Deprivileged*: the guest's kernel runs without privilege,
so every privileged instruction traps, and so do system calls and returns, which must pass through
the monitor. *Translated*: the guest's kernel runs as translated code that calls out where it would
have trapped; its own progress costs more, and system calls leave direct execution. That holds for
the kernel's stores to traced pages as well: the translator replaces an instruction that has trapped
there by a call-out (the first trap of each is not counted). A user's store to one traps always.

Source: A40 ¶50, ¶114.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ControlName = Literal["assisted", "deprivileged", "translated"]

_INTERCEPTED = frozenset({
    "invlpg", "cr3_load", "mode_change", "ipi", "disk", "balloon", "timer", "hlt", "traced store",
})  # fmt: skip
_ONLY_TRAPPED = frozenset({"interrupt flag", "return", "read control", "syscall"})


@dataclass(frozen=True)
class Control:
    """One way of control.

    Attributes:
        exits: Reasons that end in an exit of the hardware.
        callouts: Reasons that translated code calls out for.
        translates: The guest kernel's own progress runs as translated code.
    """

    exits: frozenset[str]
    callouts: frozenset[str] = frozenset()
    translates: bool = False


CONTROLS: dict[ControlName, Control] = {
    "assisted": Control(_INTERCEPTED),
    "deprivileged": Control(_INTERCEPTED | _ONLY_TRAPPED),
    "translated": Control(
        frozenset({"syscall"}), (_INTERCEPTED | _ONLY_TRAPPED) - {"syscall"}, translates=True
    ),
}
