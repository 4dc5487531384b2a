"""CR4.SMEP below a monitor: the guest's own walk refuses, whatever the shadow has."""

from __future__ import annotations

import pytest

from penumbra.hw.formats import CR4_SMEP, IA32, X86_64, FormatSpec, P, W
from penumbra.hw.streams import FETCH, READ

from .bench import CR4, Bench, Faulted, patch, shootdown

USERS, KERNELS = 0x40_0000, 0x40_1000


@pytest.mark.shows("H2", "V5", "I12")
@pytest.mark.parametrize("scheme", [shootdown(), patch()], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
@pytest.mark.parametrize("software", [False, True])
def test_a_supervisors_fetch_from_a_user_page_is_a_true_fault_from_the_load_of_smep_on(
    spec: FormatSpec, scheme: object, software: bool
) -> None:
    bench = Bench(spec, scheme, n_vcpus=1, software=software)  # type: ignore[arg-type]
    root = bench.frame()
    bench.map(root, USERS, 30)
    bench.map(root, KERNELS, 31, P | W | 0x60)
    bench.start(root)

    def fetches() -> list[object]:
        both = [bench.access(0, gva, FETCH, user=False) for gva in (USERS, KERNELS)]
        return [*both, bench.access(0, USERS, FETCH), bench.access(0, USERS, READ, user=False)]

    assert fetches() == [30, 31, 30, 30]
    bench.load_cr4(0, CR4[spec.name] | CR4_SMEP)
    assert fetches() == [Faulted(0x11), 31, 30, 30]
    bench.load_cr4(0, CR4[spec.name])
    assert fetches() == [30, 31, 30, 30]
    bench.assert_coherent()
