"""INVLPG of many addresses by one call does what as many calls do."""

from __future__ import annotations

import pytest

from penumbra.hw.formats import IA32, X86_64, FormatSpec

from .rig import ALL, ENGINES, READ, Rig

N_PAGES = 150
HIGH = 0xFFFF_8000_0000_0000


def filled(spec: FormatSpec, engine: str, base: int) -> Rig:
    """Return a machine whose TLB holds what fits of the pages."""
    rig = Rig(spec, engine, n_frames=256)
    for page in range(N_PAGES):
        rig.map(base + (page << 12), 40 + page, ALL)
        rig.cpu.translate(base + (page << 12), READ, True)
    return rig


@pytest.mark.parametrize("n", [0, 1, 3, 4, 63, 64, 65, 130, N_PAGES])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("spec", "base"), [(IA32, 0x4000_0000), (X86_64, HIGH)])
def test_one_call_drops_what_as_many_calls_drop(
    spec: FormatSpec, base: int, engine: str, n: int
) -> None:
    """However many there are, less than a batch, one, or several; addresses of either half."""
    together, apart = filled(spec, engine, base), filled(spec, engine, base)
    # The youngest first: those are in the TLB.
    gvas = tuple(base + (page << 12) for page in reversed(range(N_PAGES)))[:n]
    assert together.tlb.entries()
    together.cpu.invlpg_all(gvas)
    for gva in gvas:
        apart.cpu.invlpg(gva)
    assert together.tlb.array.tolist() == apart.tlb.array.tolist()
    left = {key & ((1 << 36) - 1) for key in together.tlb.entries()}
    assert not left & {gva >> 12 & ((1 << 36) - 1) for gva in gvas}
    together.tlb.check()
