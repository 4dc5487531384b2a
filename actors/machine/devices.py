"""A machine's device window and what its lines lead to: interrupts, and the console.

The virtual interrupts go where any IPI goes. A complete line of text is one use of the physical
machine's console: a call of the kernel if there is one, which tells the console world.

Source: A40 ¶38, ¶48-50 (330, 420).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from penumbra.hw.device_window import DevicePort, DeviceWindow, window_base

if TYPE_CHECKING:
    from penumbra.actors.machine.machine import Machine


class Devices:
    """The devices of one VM, one window of registers, and each VCPU's way to it."""

    def __init__(self, machine: Machine) -> None:
        """Take a machine that has its interrupt controllers and its observer."""
        self._machine = machine
        self.window = DeviceWindow(machine.interrupts, self)
        base = window_base(machine.spec)
        self.ports = [
            DevicePort(
                self.window, vcpu, base, partial(machine.observer.progress.__getitem__, vcpu)
            )
            for vcpu in range(machine.config.vcpus)
        ]

    def interrupt(self, cpu: int, targets: int, vector: int, progress: int) -> None:
        self._machine.send_ipi(cpu, targets, vector, progress)

    def line(self, cpu: int, text: str) -> None:
        machine = self._machine
        if machine.kernel_calls is not None:
            machine.kernel_calls.device_called(machine, cpu)
            machine.kernel_calls.reported(machine, text)

    def printed(self) -> list[str]:
        """Return the lines put out so far."""
        return self.window.text.decode("ascii", "backslashreplace").splitlines()

    def count(self) -> None:
        """Put the number of accesses of each VCPU into its counters."""
        for vcpu, port in enumerate(self.ports):
            if port.n_accesses:
                self._machine.observer.count(vcpu, "device_access", port.n_accesses)
