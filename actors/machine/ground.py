"""Where a VM lies in machine memory: the frames of its guest, of its monitor, and of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.machine.frames import SPARES
from penumbra.actors.machine.hardware import Hardware
from penumbra.actors.observe.events import EventLog
from penumbra.actors.vmm.compose import monitor_frames
from penumbra.actors.vmm.memory import scattered
from penumbra.actors.vmm.residents import FramePool
from penumbra.actors.vmm.schemes import Scheme
from penumbra.guest.system import GuestSystem


@dataclass(frozen=True)
class Place:
    """Where one VM of several lies.

    Attributes:
        events: The log they share.
        hardware: What they share; None: this one has hardware of its own.
        frames: The machine frames given to it.
        pool: The kernel's frames for the memory of all its guests; then `frames` are the monitor's.
    """

    vm_id: int
    events: EventLog
    hardware: Hardware | None = None
    frames: Sequence[int] | None = None
    pool: FramePool | None = None


@dataclass(frozen=True)
class Ground:
    """What a VM's memory management starts with.

    Attributes:
        frames: The machine frames it may use; None: all there are.
        absent: They are the monitor's alone, guest memory comes out of the pool on demand.
        pool: Where machine frames for guest memory come from; None: they stay where they are.
    """

    frames: Sequence[int] | None
    absent: bool = False
    pool: FramePool | None = None


def frames_wanted(config: MachineConfig, scheme: Scheme, guest: GuestSystem) -> int:
    """Return how many machine frames a VM takes: its guest's and its monitor's."""
    if scheme.shadow == "none":
        return guest.n_frames
    n_guest = _n_backed(guest) + (SPARES if config.host_moves else 0)
    if config.host_frames:
        n_guest = min(config.host_frames, _n_backed(guest))
    return n_guest + monitor_frames(scheme, config.vcpus, guest.n_frames)


def _n_backed(guest: GuestSystem) -> int:
    return guest.n_frames if guest.backed is None else len(guest.backed)


def lay_out(
    config: MachineConfig,
    scheme: Scheme,
    hardware: Hardware,
    place: Place | None,
    n_guest_frames: int,
    seed: int,
) -> Ground:
    """Divide the machine frames of a VM between guest, monitor and pool, scattered by the seed."""
    frames = place.frames if place else None
    moves = config.host_frames or config.host_moves or config.share_pages
    if scheme.shadow == "none" or not moves:
        return Ground(frames)
    if place is not None and place.pool is not None:
        return Ground(frames, absent=True, pool=place.pool)
    own = scattered(range(hardware.ram.n_frames) if frames is None else frames, seed)
    n_pool = len(own) - monitor_frames(scheme, config.vcpus, n_guest_frames)
    owner = hardware.owner if place else None
    pool = FramePool((), owner)
    for pfn in own[:n_pool]:
        pool.give(pfn)
    return Ground(own[n_pool:], absent=True, pool=pool)
