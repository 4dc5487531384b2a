"""Who was actor, producer, consumer and bystander of a change, read from a run's events.

Source: A40 ¶76: who changes a datum tells those who have an interest in it; all others stand by.
"""

from __future__ import annotations

import pytest
from machines import SMALL_POOL, SMALL_STRESS, run_machine, scheme_with

from penumbra.actors.machine.machine import Machine
from penumbra.actors.observe.events import EventKind
from penumbra.guest.workloads.workload import Workload

N_VCPUS = 4


def told(machine: Machine) -> list[list[int]]:
    """Count, for each producer and consumer, the changes of entries one told the other of."""
    columns = machine.observer.events.columns()
    counts = [[0] * N_VCPUS for _ in range(N_VCPUS)]
    rows = columns["kind"] == EventKind.PATCH_POSTED
    for producer, consumers in zip(
        columns["vcpu"][rows].tolist(), columns["arg1"][rows].tolist(), strict=True
    ):
        assert 0 < consumers < 1 << N_VCPUS
        for consumer in range(N_VCPUS):
            counts[producer][consumer] += consumers >> consumer & 1
    return counts


@pytest.mark.shows("V2")
@pytest.mark.parametrize("capacity", [1, 64])
@pytest.mark.parametrize("workload", [SMALL_POOL, SMALL_STRESS], ids=lambda workload: workload.name)
def test_the_roles_of_each_change_are_in_the_events(workload: Workload, capacity: int) -> None:
    machine, summary, _ = run_machine(
        workload, scheme_with("patch", capacity=capacity), vcpus=N_VCPUS
    )
    columns = machine.observer.events.columns()
    kinds, causes = columns["kind"], columns["cause"]
    posts = kinds == EventKind.PATCH_POSTED
    # The actor of a change is its producer: the store that caused the post, on the same VCPU.
    stores = causes[posts].astype(int) - 1
    assert set(kinds[stores].tolist()) == {EventKind.TRACED_STORE}
    assert (columns["vcpu"][stores] == columns["vcpu"][posts]).all()
    # The consumers are those whose channel got it.
    matrix = summary["matrix"]
    assert told(machine) == [
        [channel["n_posted"] + channel["n_coalesced"] for channel in row] for row in matrix
    ]
    # Or those who were shot down because theirs was full.
    shot = columns["vcpu"][kinds == EventKind.SHOOTDOWN].tolist()
    assert [shot.count(vcpu) for vcpu in range(N_VCPUS)] == [
        sum(row[vcpu]["n_overflows"] for row in matrix) for vcpu in range(N_VCPUS)
    ]
    assert (len(shot) > 0) == (capacity == 1)


@pytest.mark.shows("V2")
def test_one_vcpu_may_have_every_role_of_a_change_or_stand_by() -> None:
    machine, _, _ = run_machine(SMALL_STRESS, "patch", vcpus=N_VCPUS)
    columns = machine.observer.events.columns()
    posts = columns["kind"] == EventKind.PATCH_POSTED
    pairs = set(zip(columns["vcpu"][posts].tolist(), columns["arg1"][posts].tolist(), strict=True))
    assert any(consumers == 1 << producer for producer, consumers in pairs), "told itself alone"
    assert any(consumers.bit_count() > 1 for _, consumers in pairs), "told several"
    assert any(not consumers >> producer & 1 for producer, consumers in pairs), "told but others"
    assert all(consumers.bit_count() < N_VCPUS for _, consumers in pairs), "somebody stood by"
