"""EG5 in every schedule: a CPU logs and stores while a monitor, at another CPU's event, reads.

The code is the hardware's and the monitor's own; only the memory is the stepper's, so each access
to a word is a step. A monitor looks at the entry itself, so a record must be there when the store
is visible, and stay until it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from penumbra.actors.core.schedules import explore, run_schedule
from penumbra.actors.core.stepper import End, Model, Program, StepMemory
from penumbra.hw import mmu_layout as m
from penumbra.hw.compiled import kernels_for
from penumbra.hw.formats import IA32
from penumbra.hw.write_buffer import BufferSpec, WriteBuffer

KERNELS = kernels_for(IA32, "plain").functions
X, DONE = 1000, 1001  # the guest entry, at "physical address" 1000; and whether CPU 0 has ended
LOG, STORE, RETIRE = "log", "store", "retire"
RIGHT, LATE, EARLY = (LOG, STORE, RETIRE), (STORE, LOG, RETIRE), (LOG, RETIRE, STORE)
MODELS = pytest.mark.parametrize("model", Model, ids=lambda model: model.value)


def program(order: Sequence[str], spec: BufferSpec, n_stores: int = 2) -> Program:
    """CPU 0 stores 1, 2 ... to X; CPU 1 has an event at any time, and a last one."""

    def cpu(memory: StepMemory) -> None:
        for value in range(1, n_stores + 1):
            for step in order:
                if step == STORE:
                    memory[X] = value
                elif step == LOG:
                    while not KERNELS.log_store(memory, X, 4):
                        pass  # BufferFull: the store is tried again
                else:
                    KERNELS.retire(memory)
        memory[DONE] = 1

    def monitor(memory: StepMemory) -> list[tuple[int, int]]:
        buffer, copy, used = WriteBuffer(memory, spec), 0, []
        for last in (False, True):
            if last:
                memory.until(DONE, 1)
            seen = memory[X]
            records, lost = buffer.take()
            if lost or records:
                copy = memory[X]
            used.append((seen, copy))
        return used

    def judge(end: End) -> str | None:
        used = end.results["M"]
        assert isinstance(used, list)
        for seen, copy in used[:1]:
            if copy < seen:
                return f"the event knew of {seen} and left {copy}"
        last = used[-1][1]
        return None if last == n_stores else f"{last} is left for good"

    settings = {m.R_LOG_SIZE: spec.records, m.R_LOG_LOSES: int(spec.loses)}
    return Program({"C": cpu, "M": monitor}, judge, settings)


@pytest.mark.shows("EG5", "H10")
@MODELS
@pytest.mark.parametrize(
    ("spec", "n_stores"),
    [
        (BufferSpec(2, combines=False), 1),
        (BufferSpec(2, combines=False), 2),
        (BufferSpec(1, combines=False, loses=True), 2),
    ],
    ids=["one store", "two stores", "one record, losing"],
)
def test_logged_stored_retired_loses_nothing_in_any_schedule(
    spec: BufferSpec, n_stores: int, model: Model
) -> None:
    verdict = explore(program(RIGHT, spec, n_stores), model)
    assert (verdict.n_failing, verdict.reason) == (0, "")
    assert verdict.n_schedules > 100


@pytest.mark.shows("EG5")
@MODELS
@pytest.mark.parametrize(
    ("order", "wrong"),
    [(LATE, "the event knew of 1 and left 0"), (EARLY, "0 is left for good")],
    ids=["late", "early"],
)
def test_a_record_that_comes_late_or_goes_early_leaves_a_stale_copy(
    order: Sequence[str], wrong: str, model: Model
) -> None:
    broken = program(order, BufferSpec(2, combines=False), 1)
    verdict = explore(broken, model)
    assert (verdict.n_failing > 0, verdict.reason) == (True, wrong)
    assert broken.judge(run_schedule(broken, verdict.failure, model)) == wrong
