"""Random accesses around the device window: every scheme makes of them what native does.

Source: A40 ¶38; requirement V11.
"""

from __future__ import annotations

from typing import Any

import pytest
from device_programs import WINDOW_AT, map_window
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import run_machine, workload_of
from small_programs import SmallProgram, map_pages

from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.workloads.verify import SHARED_AT
from penumbra.hw import device_window as w
from penumbra.hw.operations import (
    CompareExchange,
    Copy,
    Exchange,
    Fill,
    Load,
    Mark,
    Operation,
    Store,
    Syscall,
    XorMemory,
)

# Memory, the window, memory: what goes beyond one page ends in the next.
FIRST, LAST = WINDOW_AT - 0x1000, WINDOW_AT + 0x1000
REGISTERS = (w.ID, w.END, w.COMMAND, w.TIMER, w.REMAINING, w.CONSOLE, w.COUNTER, w.SCRATCH)
VALUES = (0, 1, 77, 0x51, 0x52 | 1 << 18, 0x53 | 2 << 18, 0xFE, (1 << 64) - 1)

near = st.one_of(
    st.builds(
        lambda at, inside: WINDOW_AT + at + inside, st.sampled_from(REGISTERS), st.integers(0, 7)
    ),
    st.sampled_from(REGISTERS).map(lambda at: WINDOW_AT + at),
    st.integers(WINDOW_AT - 8, WINDOW_AT + 8),
    st.integers(LAST - 8, LAST + 8),
    st.integers(FIRST, LAST + 0xFF0),
)
aligned = st.integers(FIRST // 8, (LAST + 0xE00) // 8).map(lambda word: 8 * word)
size, value = st.sampled_from((1, 2, 4, 8)), st.sampled_from(VALUES)
length = st.integers(1, 64).map(lambda n: 8 * n)


def cut(operation: Any) -> Any:
    """Keep a value within its operation's size."""
    mask = (1 << 8 * operation.size) - 1
    fields = {name: getattr(operation, name) for name in operation.__struct_fields__}
    for name in ("value", "expected"):
        if name in fields:
            fields[name] &= mask
    return type(operation)(**fields)


operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(Load, near, size),
    st.builds(Store, near, size, value).map(cut),
    st.builds(Exchange, near, size, value).map(cut),
    st.builds(CompareExchange, near, size, value, value).map(cut),
    st.builds(XorMemory, near, size, value).map(cut),
    st.builds(Fill, aligned, length, value),
    st.builds(Copy, aligned, aligned, length),
    st.builds(lambda prot: Syscall("mprotect", (WINDOW_AT, 0x1000, prot)), st.sampled_from((1, 3))),
)


def random_program(made: list[Operation]) -> SmallProgram:
    async def main() -> None:
        await map_pages(SHARED_AT, 1)
        await map_pages(FIRST, 3)
        await map_window()
        for operation in made:
            found = await operation
            await Mark("read", (found or 0,))

    return SmallProgram("random", (main,))


@pytest.mark.shows("V11", "C5")
@settings(max_examples=25, deadline=None)
@given(
    made=st.lists(operations, min_size=1, max_size=30),
    scheme=st.sampled_from([name for name in PRESETS if name != "native"]),
    paging=st.sampled_from(("ia32", "x86-64")),
)
def test_random_accesses_give_the_same_everywhere(
    made: list[Operation], scheme: str, paging: str
) -> None:
    work = workload_of(random_program(made))
    runs = []
    for name in ("native", scheme):
        machine, summary, verdict = run_machine(work, name, vcpus=2, paging=paging)
        assert verdict is not None
        assert verdict.coherent, verdict.explain()
        machine.devices.window.check()
        runs.append(
            [summary[key] for key in ("ended", "processes", "marks", "printed", "progress")]
        )
    assert runs[0] == runs[1]
