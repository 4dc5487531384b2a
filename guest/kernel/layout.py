"""Where the guest keeps what: its physical memory, and the kernel's window in each address space.

    guest-physical                           guest-virtual, the same in every address space
    0        firmware hole, never used       window_gva   direct map of the page-table pool
    1 MiB    page-table pool                 slots_gva    temporary slots, two per VCPU
    ...      user frames

The kernel reaches page tables, locks and mailboxes through the direct map and user frames through
the slots; it needs no other address. Both are supervisor-only. The window is put where the programs
have nothing: a recorded 32-bit program may have its stack near 4 GiB, so nothing is fixed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, FormatSpec

MIB = 1 << 20
FIRMWARE_FRAMES = 256
MAX_VCPUS = 16
SLOTS_PER_VCPU = 2
MIN_POOL_FRAMES = 32


class LayoutError(ValueError):
    """No place for the kernel's window, or a size that cannot be."""


@dataclass(frozen=True)
class Layout:
    """The guest's map.

    Invariant: the pool lies inside RAM; the window's two parts start at a leaf table's span each.

    Attributes:
        ram_bytes: Size of guest RAM, from guest-physical 0.
        pool_gfn: First frame of the page-table pool.
        pool_frames: Number of its frames.
        window_gva: Start of the pool's direct map.
        slots_gva: Start of the temporary slots.
        user_base: Where the kernel begins to look for room when a program lets it choose.
    """

    ram_bytes: int
    pool_gfn: int
    pool_frames: int
    window_gva: int
    slots_gva: int
    user_base: int

    @property
    def n_frames(self) -> int:
        return self.ram_bytes >> PAGE_SHIFT

    @property
    def first_user_gfn(self) -> int:
        return self.pool_gfn + self.pool_frames

    @property
    def window_end(self) -> int:
        """First address above the kernel's window."""
        return self.slots_gva + MAX_VCPUS * SLOTS_PER_VCPU * PAGE_BYTES

    def direct(self, gfn: int) -> int:
        """Return the address at which the kernel sees pool frame `gfn`."""
        return self.window_gva + ((gfn - self.pool_gfn) << PAGE_SHIFT)

    def in_window(self, gva: int) -> bool:
        return self.window_gva <= gva < self.window_end

    def check(self, spec: FormatSpec) -> None:
        span = 1 << spec.levels[1].shift
        assert self.window_gva % span == 0 and self.slots_gva % span == 0
        assert self.window_gva + self.pool_frames * PAGE_BYTES <= self.slots_gva
        assert self.first_user_gfn < self.n_frames


def default_layout(
    spec: FormatSpec,
    peak_pages: int,
    used: Iterable[tuple[int, int]] = (),
    *,
    ram_bytes: int = 0,
    pool_bytes: int = 0,
) -> Layout:
    """Compute the map for programs that need up to `peak_pages` resident pages.

    Args:
        used: Ranges of guest-virtual pages (first page number, number of pages) to keep clear of.
        ram_bytes: Overrides the default, the larger of 64 MiB and 1.5 times the peak.
        pool_bytes: Overrides the default, the larger of 8 MiB and an eighth of RAM.

    Raises:
        LayoutError: The window fits nowhere, or the pool is too large or too small.
    """
    ram_bytes = ram_bytes or max(64 * MIB, -(-3 * peak_pages * PAGE_BYTES // (2 * MIB)) * MIB)
    pool_bytes = pool_bytes or max(8 * MIB, ram_bytes // 8 // MIB * MIB)
    pool_frames = pool_bytes >> PAGE_SHIFT
    if FIRMWARE_FRAMES + pool_frames >= ram_bytes >> PAGE_SHIFT:
        raise LayoutError(f"a pool of {pool_bytes} bytes leaves nothing of {ram_bytes} bytes")
    if pool_frames < MIN_POOL_FRAMES:
        raise LayoutError(f"a pool of {pool_bytes} bytes cannot hold the kernel's own tables")
    span = 1 << spec.levels[1].shift
    direct_bytes = -(-pool_bytes // span) * span
    window = _find_window(spec, direct_bytes + span, list(used))
    base = 1 << 30 if spec.va_bits == 32 else 1 << 36
    layout = Layout(ram_bytes, FIRMWARE_FRAMES, pool_frames, window, window + direct_bytes, base)
    layout.check(spec)
    return layout


def _find_window(spec: FormatSpec, n_bytes: int, used: list[tuple[int, int]]) -> int:
    """Return the start of a free range of whole root entries, in the half where kernels live."""
    step = 1 << spec.levels[-1].shift
    size = -(-n_bytes // step) * step
    limit = 1 << (64 if spec.sign_extended else spec.va_bits)
    lowest = limit - (1 << (spec.va_bits - 1)) if spec.sign_extended else step
    starts = (
        range(lowest, limit - size, step)
        if spec.sign_extended
        else range(limit - size, lowest, -step)
    )
    for start in starts:
        first, stop = start >> PAGE_SHIFT, (start + size) >> PAGE_SHIFT
        if all(vpn >= stop or vpn + n <= first for vpn, n in used):
            return start
    raise LayoutError(f"no free {size} bytes of addresses for the kernel's window")
